"""The load-balance loss equals a token-by-token reference, for layers of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_moe.modules.load_balance import load_balance_loss
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.moe.surgery import keep_experts
from tests.helpers import reference
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan


def routing(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
    return Routing(logits_TE, weights_TK, ids_TK)


def slow(routings: list[Routing], mask_T: Tensor | None = None) -> float:
    num_tokens = routings[0].logits_TE.shape[0]
    counted = [True] * num_tokens if mask_T is None else mask_T.bool().tolist()
    return reference.load_balance([(r.logits_TE.tolist(), r.expert_ids_TK.tolist()) for r in routings], counted)


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    num_tokens=st.integers(1, 12),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_loss_equals_the_reference(sizes: list[int], num_tokens: int, seed: int, data: st.DataObject) -> None:
    """Layers of different sizes and top_k, with and without a mask."""
    routings = [routing(num_tokens, size, data.draw(st.integers(1, size)), seed + i) for i, size in enumerate(sizes)]
    assert float(load_balance_loss(routings)) == pytest.approx(slow(routings), rel=1e-5)
    mask = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens).filter(any))
    for mask_T in (torch.tensor(mask), torch.tensor(mask).long(), torch.tensor(mask).float()):
        assert float(load_balance_loss(routings, mask_T)) == pytest.approx(slow(routings, mask_T), rel=1e-5)


@pytest.mark.parametrize("sizes", [(4,), (8, 2, 5)])
def test_even_routing_costs_one(sizes: tuple[int, ...]) -> None:
    """Equal logits, and each expert chosen as often as any other, whatever their number."""
    routings = []
    for size in sizes:
        ids_TK = torch.arange(40)[:, None] % size
        routings.append(Routing(torch.zeros(40, size), torch.ones(40, 1), ids_TK))
    assert float(load_balance_loss(routings)) == pytest.approx(1.0, abs=1e-6)


def test_all_to_one_expert_costs_the_number_of_experts() -> None:
    logits_TE = torch.full((10, 5), -50.0)
    logits_TE[:, 3] = 50.0
    collapsed = Routing(logits_TE, torch.ones(10, 1), torch.full((10, 1), 3))
    assert float(load_balance_loss([collapsed])) == pytest.approx(5.0, abs=1e-5)


def test_the_loss_by_hand() -> None:
    """Two tokens, two experts, top-1, both to expert 0 with probabilities 3/4 and 1/2:
    f = (1, 0), p = (5/8, 3/8), so 2 * 5/8 = 5/4."""
    logits_TE = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    assert float(load_balance_loss([Routing(logits_TE, torch.ones(2, 1), torch.zeros(2, 1).long())])) == 1.25


def test_masked_tokens_change_nothing() -> None:
    whole = routing(12, 6, 2)
    mask_T = torch.tensor([1] * 7 + [0] * 5)
    part = Routing(whole.logits_TE[:7], whole.weights_TK[:7], whole.expert_ids_TK[:7])
    torch.testing.assert_close(load_balance_loss([whole], mask_T), load_balance_loss([part]))


def test_a_mask_of_nothing_is_no_loss() -> None:
    assert float(load_balance_loss([routing(6, 4, 2)], torch.zeros(6))) == 0


def test_permuting_experts_does_not_change_the_loss() -> None:
    whole, order = routing(20, 6, 2), torch.tensor([4, 2, 0, 5, 1, 3])
    moved = Routing(whole.logits_TE[:, order], whole.weights_TK, order.argsort()[whole.expert_ids_TK])
    torch.testing.assert_close(load_balance_loss([moved]), load_balance_loss([whole]))


def test_without_padding_it_is_the_loss_of_transformers_times_a_constant() -> None:
    """Theirs counts assignments per token, so it is ``top_k`` times larger, and it joins the tokens of all layers,
    which for one layer is the same."""
    one = routing(30, 8, 2)
    theirs = load_balancing_loss_func((one.logits_TE,), num_experts=8, top_k=2)
    torch.testing.assert_close(2 * load_balance_loss([one]), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_routers(family: str) -> None:
    """Of every layer of a non-uniform model, and only through the probabilities: ``f`` is a count."""
    model = tiny_model(family)
    keep_experts(model, non_uniform_plan(model))
    layers = find_moe_layers(model)
    routings: dict[str, Routing] = {}
    with record_routing(layers, lambda layer, routing: routings.update({layer.name: routing})):
        model(tiny_batch(length=8))
    loss = load_balance_loss(list(routings.values()))
    assert loss.item() == pytest.approx(slow(list(routings.values())), rel=1e-4)
    loss.backward()
    for layer in layers:
        assert layer.router_weight.grad is not None and layer.router_weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in layers[-1].experts.parameters())


def test_the_gradient_of_the_logits_is_that_of_the_formula() -> None:
    """With ``f`` held: d loss / d logit = E / T * p_e * (f_e - sum_i f_i p_i), layer by layer."""
    one = routing(9, 5, 2)
    logits_TE = one.logits_TE.clone().requires_grad_()
    load_balance_loss([Routing(logits_TE, one.weights_TK, one.expert_ids_TK)]).backward()
    for t in range(9):
        p = reference.softmax(one.logits_TE[t].tolist())
        f = [one.expert_ids_TK.flatten().tolist().count(expert) / 18 for expert in range(5)]
        middle = reference.dot(f, p)
        expected = torch.tensor([5 / 9 * p[e] * (f[e] - middle) for e in range(5)])
        torch.testing.assert_close(logits_TE.grad[t], expected, atol=1e-6, rtol=1e-4)


def test_recomputing_activations_changes_no_gradient() -> None:
    """The routers are watched in the forward; their gradients must not get lost in the second one."""
    gradients = []
    for recompute in (False, True):
        model = tiny_model("mixtral").train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        layers, routings = find_moe_layers(model), []
        with record_routing(layers, lambda _, routing, routings=routings: routings.append(routing)):
            model(tiny_batch(), use_cache=False)
        load_balance_loss(routings).backward()
        gradients.append([layer.router_weight.grad for layer in layers])
    torch.testing.assert_close(*gradients)
