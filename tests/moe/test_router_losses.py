"""The routers' losses equal token-by-token references: values, gradients, padding and experts masked out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.router_losses import gate_entropy_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, mask_plan, record_routing
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan
from tests.helpers.reference import vectors as reference
from tests.helpers.reference.router_losses import load_balance

LOSSES = (load_balance_loss, router_z_loss, gate_entropy_loss)


def routing(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
    return Routing(logits_TE, weights_TK, ids_TK)


def mean_loss(routings: Sequence[Routing], mask_T: Tensor | None = None) -> Tensor:
    """The load-balance loss of a model: the mean over its layers."""
    return torch.stack([load_balance_loss(one, mask_T) for one in routings]).mean()


def slow(routings: list[Routing], mask_T: Tensor | None = None) -> float:
    num_tokens = routings[0].logits_TE.shape[0]
    counted = [True] * num_tokens if mask_T is None else mask_T.bool().tolist()
    return load_balance([(r.logits_TE.tolist(), r.expert_ids_TK.tolist()) for r in routings], counted)


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    num_tokens=st.integers(1, 12),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_loss_equals_the_reference(sizes: list[int], num_tokens: int, seed: int, data: st.DataObject) -> None:
    """Layers of different sizes and top_k, with and without a mask."""
    routings = [routing(num_tokens, size, data.draw(st.integers(1, size)), seed + i) for i, size in enumerate(sizes)]
    assert float(mean_loss(routings)) == pytest.approx(slow(routings), rel=1e-5)
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens).filter(any))
    for mask_T in (torch.tensor(mask), torch.tensor(mask).long(), torch.tensor(mask).float()):
        assert float(mean_loss(routings, mask_T)) == pytest.approx(slow(routings, mask_T), rel=1e-5)


@pytest.mark.parametrize("sizes", [(4,), (8, 2, 5)])
def test_even_routing_costs_one(sizes: tuple[int, ...]) -> None:
    """Equal logits, and each expert chosen as often as any other, whatever their number."""
    routings = []
    for size in sizes:
        ids_TK = torch.arange(40)[:, None] % size
        routings.append(Routing(torch.zeros(40, size), torch.ones(40, 1), ids_TK))
    assert float(mean_loss(routings)) == pytest.approx(1.0, abs=1e-6)


def test_all_to_one_expert_costs_the_number_of_experts() -> None:
    logits_TE = torch.full((10, 5), -50.0)
    logits_TE[:, 3] = 50.0
    collapsed = Routing(logits_TE, torch.ones(10, 1), torch.full((10, 1), 3))
    assert float(load_balance_loss(collapsed)) == pytest.approx(5.0, abs=1e-5)


def test_the_loss_by_hand() -> None:
    """Two tokens, two experts, top-1, both to expert 0 with probabilities 3/4 and 1/2:
    f = (1, 0), p = (5/8, 3/8), so 2 * 5/8 = 5/4."""
    logits_TE = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    assert float(load_balance_loss(Routing(logits_TE, torch.ones(2, 1), torch.zeros(2, 1).long()))) == 1.25


def test_masked_tokens_change_nothing() -> None:
    whole = routing(12, 6, 2)
    mask_T = torch.tensor([1] * 7 + [0] * 5)
    part = Routing(whole.logits_TE[:7], whole.weights_TK[:7], whole.expert_ids_TK[:7])
    torch.testing.assert_close(load_balance_loss(whole, mask_T), load_balance_loss(part))


def test_a_mask_of_nothing_is_no_loss() -> None:
    assert float(load_balance_loss(routing(6, 4, 2), torch.zeros(6))) == 0


def test_permuting_experts_does_not_change_the_loss() -> None:
    whole, order = routing(20, 6, 2), torch.tensor([4, 2, 0, 5, 1, 3])
    moved = Routing(whole.logits_TE[:, order], whole.weights_TK, order.argsort()[whole.expert_ids_TK])
    torch.testing.assert_close(load_balance_loss(moved), load_balance_loss(whole))


def test_without_padding_it_is_the_loss_of_transformers_times_a_constant() -> None:
    """Theirs counts assignments per token, so it is ``top_k`` times larger, and it joins the tokens of all layers,
    which for one layer is the same."""
    one = routing(30, 8, 2)
    theirs = load_balancing_loss_func((one.logits_TE,), num_experts=8, top_k=2)
    torch.testing.assert_close(2 * load_balance_loss(one), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_routers(family: str) -> None:
    """Of every layer of a non-uniform model, and only through the probabilities: ``f`` is a count."""
    model = tiny_model(family)
    keep_experts(model, non_uniform_plan(model))
    layers = find_moe_layers(model)
    routings: dict[str, Routing] = {}
    with record_routing(layers, lambda layer, routing: routings.update({layer.name: routing})):
        model(tiny_batch(length=8))
    loss = mean_loss(list(routings.values()))
    assert loss.item() == pytest.approx(slow(list(routings.values())), rel=1e-4)
    loss.backward()
    for layer in layers:
        assert layer.router_weight.grad is not None and layer.router_weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in layers[-1].experts.parameters())


def test_the_gradient_of_the_logits_is_that_of_the_formula() -> None:
    """With ``f`` held: d loss / d logit = E / T * p_e * (f_e - sum_i f_i p_i), layer by layer."""
    one = routing(9, 5, 2)
    logits_TE = one.logits_TE.clone().requires_grad_()
    load_balance_loss(Routing(logits_TE, one.weights_TK, one.expert_ids_TK)).backward()
    for t in range(9):
        p = reference.softmax(one.logits_TE[t].tolist())
        f = [one.expert_ids_TK.flatten().tolist().count(expert) / 18 for expert in range(5)]
        middle = reference.dot(f, p)
        expected = torch.tensor([5 / 9 * p[e] * (f[e] - middle) for e in range(5)])
        torch.testing.assert_close(logits_TE.grad[t], expected, atol=1e-6, rtol=1e-4)


def test_16_bit_training_loses_nothing() -> None:
    """Under autocast a product of matrices would be rounded to 8 bits; a loss must not be."""
    one, mask_T = routing(200, 8, 2), torch.arange(200) % 3 > 0
    for loss in LOSSES:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(one, mask_T)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(one, mask_T), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------- z-loss


def slow_z(one: Routing, counted: Sequence[bool]) -> float:
    """Token by token, eq. 5 of ST-MoE."""
    squares = [
        math.log(sum(math.exp(logit) for logit in row)) ** 2
        for row, counts in zip(one.logits_TE.tolist(), counted, strict=True)
        if counts
    ]
    return sum(squares) / len(squares)


@given(num_tokens=st.integers(1, 12), size=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_the_z_loss_equals_the_reference(num_tokens: int, size: int, seed: int, data: st.DataObject) -> None:
    one = routing(num_tokens, size, 1, seed)
    assert float(router_z_loss(one)) == pytest.approx(slow_z(one, [True] * num_tokens), rel=1e-4, abs=1e-6)
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens).filter(any))
    for mask_T in (torch.tensor(mask), torch.tensor(mask).long(), torch.tensor(mask).float()):
        assert float(router_z_loss(one, mask_T)) == pytest.approx(slow_z(one, mask), rel=1e-4, abs=1e-6)


def test_the_z_loss_by_hand() -> None:
    """Two tokens whose exponentials sum to 4 and to 1: (log(4)^2 + 0^2) / 2."""
    logits_TE = torch.tensor([[3.0, 1.0], [0.5, 0.5]]).log()
    one = Routing(logits_TE, torch.ones(2, 1), torch.zeros(2, 1).long())
    assert float(router_z_loss(one)) == pytest.approx(math.log(4) ** 2 / 2, rel=1e-6)


def test_the_z_loss_has_its_least_at_a_log_sum_of_zero() -> None:
    """Only the scale of the logits counts, not their spread: shifting each token's to ``logsumexp`` 0 costs nothing."""
    one = routing(20, 6, 2)
    shifted_TE = one.logits_TE - one.logits_TE.logsumexp(-1, keepdim=True)
    assert float(router_z_loss(Routing(shifted_TE, one.weights_TK, one.expert_ids_TK))) == pytest.approx(0, abs=1e-10)


def test_large_logits_do_not_overflow() -> None:
    one = Routing(torch.full((4, 8), 1e4), torch.ones(4, 1), torch.zeros(4, 1).long())
    assert float(router_z_loss(one)) == pytest.approx((1e4 + math.log(8)) ** 2, rel=1e-6)
    half = Routing(one.logits_TE.half(), one.weights_TK.half(), one.expert_ids_TK)
    assert math.isfinite(float(router_z_loss(half)))


# ------------------------------------------------------------------------------------------ gate entropy


def slow_entropy(rows: Sequence[Sequence[float]]) -> float:
    """Expert by expert, of the tokens that count; 0 where there is but one expert."""
    if len(rows[0]) == 1:
        return 0.0
    entropies = [-sum(p * math.log(p) for p in reference.softmax(row) if p > 0) for row in rows]
    return reference.mean(entropies) / math.log(len(rows[0]))


@given(num_tokens=st.integers(1, 12), size=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_the_gate_entropy_equals_the_reference(num_tokens: int, size: int, seed: int, data: st.DataObject) -> None:
    """With padding and with experts masked out, which might as well not be there."""
    one = routing(num_tokens, size, 1, seed)
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens).filter(any))
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    logits_TE = one.logits_TE.masked_fill(~torch.tensor(kept), -torch.inf)
    left = Routing(logits_TE, one.weights_TK, one.expert_ids_TK)
    rows = [[logit for logit, stays in zip(row, kept, strict=True) if stays] for row in one.logits_TE.tolist()]
    assert float(gate_entropy_loss(left)) == pytest.approx(slow_entropy(rows), rel=1e-5, abs=1e-6)
    counted = [row for row, counts in zip(rows, mask, strict=True) if counts]
    for mask_T in (torch.tensor(mask), torch.tensor(mask).long(), torch.tensor(mask).float()):
        assert float(gate_entropy_loss(left, mask_T)) == pytest.approx(slow_entropy(counted), rel=1e-5, abs=1e-6)


def test_the_gate_entropy_by_hand() -> None:
    """Two tokens, of probabilities (1/2, 1/4, 1/4) and (1/2, 1/2, 0): 3/2 and 1 bits, where log2(3) is the most."""
    logits_TE = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).log()
    one = Routing(logits_TE, torch.ones(2, 1), torch.zeros(2, 1).long())
    assert float(gate_entropy_loss(one)) == pytest.approx(1.25 / math.log2(3), rel=1e-6)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_the_gate_entropy_lies_between_sure_and_even(size: int) -> None:
    """Whatever the number of experts; where a router is sure, also beyond what float32 can tell from 0, it is 0."""
    even = Routing(torch.full((3, size), 7.0), torch.ones(3, 1), torch.zeros(3, 1).long())
    assert float(gate_entropy_loss(even)) == pytest.approx(1.0, rel=1e-6)
    sure = Routing(1e4 * torch.eye(size)[:2], torch.ones(2, 1), torch.arange(2)[:, None])
    assert float(gate_entropy_loss(sure)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dropped", [[], [1], [0, 2, 3, 4]], ids=["whole", "one masked", "one left"])
def test_the_gradient_of_the_gate_entropy_is_that_of_the_formula(dropped: list[int]) -> None:
    """d H / d logit = -p (log p + H), over T log E; 0 at what is masked, and nowhere not a number."""
    logits_TE = routing(9, 5, 2).logits_TE.double().requires_grad_()
    masked_TE = logits_TE.index_fill(1, torch.tensor(dropped, dtype=torch.long), -torch.inf)
    gate_entropy_loss(Routing(masked_TE, torch.ones(9, 1), torch.zeros(9, 1).long())).backward()
    kept = [expert for expert in range(5) if expert not in dropped]
    expected_TE = torch.zeros(9, 5, dtype=torch.float64)
    for t in range(9):
        p = reference.softmax(logits_TE[t, kept].tolist())
        entropy = -sum(one * math.log(one) for one in p)
        slopes = [-one * (math.log(one) + entropy) / (9 * math.log(max(len(kept), 2))) for one in p]
        expected_TE[t, kept] = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(logits_TE.grad, expected_TE, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_entropy_of_a_masked_model_is_that_of_a_cut_one(family: str) -> None:
    """Layer by layer, of different counts; and its gradient reaches the routers and their kept rows alone."""
    cut, masked = tiny_model(family), tiny_model(family)
    keep, found = non_uniform_plan(cut), []
    keep_experts(cut, keep)
    for model, plan in ((cut, {}), (masked, keep)):
        layers, losses = find_moe_layers(model), []
        with mask_plan(layers, plan), record_routing(layers, lambda _, one, to=losses: to.append(one)):
            model(tiny_batch(length=8))
        found.append([gate_entropy_loss(one) for one in losses])
    torch.testing.assert_close(torch.stack(found[1]), torch.stack(found[0]), rtol=1e-4, atol=1e-6)
    sum(found[1]).backward()
    for layer in find_moe_layers(masked):
        grad = layer.router_weight.grad
        assert grad is not None and grad.isfinite().all()
        gone = sorted(set(range(layer.num_experts)) - set(keep.get(layer.name, range(layer.num_experts))))
        assert grad.abs().sum() > 0 and grad[gone].eq(0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_nothing(loss: Callable[..., Tensor]) -> None:
    """Neither its loss nor its gradient, and padding itself has no gradient."""
    whole = routing(12, 6, 2)
    mask_T = torch.tensor([1] * 7 + [0] * 5)
    padded_TE, alone_TE = whole.logits_TE.clone().requires_grad_(), whole.logits_TE[:7].clone().requires_grad_()
    padded = loss(Routing(padded_TE, whole.weights_TK, whole.expert_ids_TK), mask_T)
    alone = loss(Routing(alone_TE, whole.weights_TK[:7], whole.expert_ids_TK[:7]))
    torch.testing.assert_close(padded, alone)
    padded.backward()
    alone.backward()
    torch.testing.assert_close(padded_TE.grad[:7], alone_TE.grad)
    assert padded_TE.grad[7:].eq(0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient(loss: Callable[..., Tensor]) -> None:
    one = routing(6, 4, 2)
    logits_TE = one.logits_TE.clone().requires_grad_()
    value = loss(Routing(logits_TE, one.weights_TK, one.expert_ids_TK), torch.zeros(6))
    value.backward()
    assert value.item() == 0
    assert logits_TE.grad.eq(0).all()
