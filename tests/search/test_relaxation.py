"""The relaxations: where they start, what they compute, and what their gradients say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.importance import ImportanceLogits
from lightning_moe.search.objective import head_inputs
from lightning_moe.search.relaxation import Relaxation, relaxed
from tests.helpers.families import FAMILIES, NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan
from tests.search.reference import slowly_relaxed
from tests.search.tiny_search import batch_of, uneven_model, wrapped

RELAXATIONS: list[Relaxation] = ["routed", "dense-routed", "literal"]


def parts_of(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    return [(layer.router, layer.experts) for layer in find_moe_layers(model)]


def importance_of(model: PreTrainedModel, seed: int | None = None) -> ImportanceLogits:
    """At the start, or anywhere."""
    importance = ImportanceLogits([layer.num_experts for layer in find_moe_layers(model)])
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in importance.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
    return importance


def logits_of(
    model: PreTrainedModel, importance: ImportanceLogits, relaxation: Relaxation, ids: Tensor | None = None
) -> Tensor:
    with relaxed(model, find_moe_layers(model), importance, relaxation):
        logits: Tensor = model(tiny_batch() if ids is None else ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_start_is_the_pretrained_model(family: str) -> None:
    """Bit by bit: logits, and what the head is given, where the teacher's comes from the decoder alone."""
    model = tiny_model(family)
    for cut in (False, True):  # the second time with layers of 4 and 6 experts
        if cut:
            keep_experts(model, non_uniform_plan(model))
        module = wrapped(model).eval()
        expected, teacher = model(tiny_batch(), use_cache=False).logits, module.decode(batch_of(tiny_batch()))
        with head_inputs(model) as hidden:
            found = logits_of(model, importance_of(model), "routed")
        assert torch.equal(found, expected)
        assert torch.equal(hidden[0], teacher)
        assert torch.equal(model(tiny_batch(), use_cache=False).logits, expected)  # the gates are gone


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_equals_a_slow_reference(family: str, relaxation: Relaxation) -> None:
    """Logits, and the gradients of alpha and beta, in float64; layers of 4 and 6 experts."""
    model = uneven_model(family).double().requires_grad_(False)
    importance, ids = importance_of(model, seed=1), tiny_batch(1, 7)
    probe = torch.randn(1, 7, model.config.vocab_size, generator=torch.Generator().manual_seed(2)).double()

    found = logits_of(model, importance, relaxation, ids)
    (found * probe).sum().backward()
    alphas = [alpha_E.detach().double().requires_grad_() for alpha_E in importance.alphas]
    beta_L = importance.beta_L.detach().double().requires_grad_()
    with slowly_relaxed(parts_of(model), alphas, beta_L, relaxation):
        expected = model(ids, use_cache=False).logits
    (expected * probe).sum().backward()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for fast, slow in zip([*importance.alphas, importance.beta_L], [*alphas, beta_L], strict=True):
        assert slow.grad is not None and slow.grad.abs().max() > 1e-2
        torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_routed_is_routed_where_the_router_takes_all() -> None:
    """Mixtral's weights of its top 8 of 8 are the softmax of all logits."""
    model = tiny_model("mixtral", num_experts_per_tok=NUM_EXPERTS)
    importance = importance_of(model, seed=3)
    torch.testing.assert_close(
        logits_of(model, importance, "dense-routed"), logits_of(model, importance, "routed"), rtol=1e-5, atol=1e-5
    )
    few = tiny_model("mixtral")
    assert not torch.allclose(logits_of(few, importance, "dense-routed"), logits_of(few, importance, "routed"))


@torch.no_grad()
def test_literal_asks_no_router() -> None:
    model = tiny_model("mixtral")
    importance = importance_of(model, seed=4)
    before = logits_of(model, importance, "literal")
    for layer in find_moe_layers(model):
        layer.router_weight.neg_()
    assert torch.equal(logits_of(model, importance, "literal"), before)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_permuting_experts_permutes_the_gradient(family: str, relaxation: Relaxation) -> None:
    model = tiny_model(family).double().requires_grad_(False)
    order = [5, 7, 4, 6, 2, 0, 3, 1]  # whole groups of four change places, as DeepSeek-V3 wants
    importance = importance_of(model, seed=5)

    def gradients() -> list[Tensor]:
        importance.zero_grad()
        logits = logits_of(model, importance, relaxation)
        logits.log_softmax(-1)[..., 7].sum().backward()
        return [parameter.grad.clone() for parameter in (*importance.alphas, importance.beta_L)]

    before = gradients()
    router, experts = parts_of(model)[-1]
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers(), *experts.parameters()):
            assert tensor.shape[0] == NUM_EXPERTS
            tensor.copy_(tensor[order].clone())
        importance.alphas[-1].copy_(importance.alphas[-1][order].clone())
    after = gradients()
    before[-2] = before[-2][order]
    for one, other in zip(before, after, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_gates_and_weights_are_not_rounded_in_a_bfloat16_model(relaxation: Relaxation) -> None:
    """5 experts, and 1/5 is no binary number: bfloat16 is 0.1% off."""
    model = tiny_model("mixtral", num_local_experts=5).to(torch.bfloat16)
    layers, importance = find_moe_layers(model), importance_of(model, seed=6)
    with relaxed(model, layers, importance, relaxation):
        logits = model(tiny_batch(1, 6), use_cache=False).logits
        for layer, gates_E in zip(layers, importance.gates(), strict=True):
            hooks = vars(layer.experts)["lightning_moe_hooks"]
            assert hooks.gates_E.dtype == torch.float32
            assert torch.equal(hooks.gates_E, gates_E)
            if relaxation != "routed":
                ids, weights = hooks.route(torch.zeros(6, 2, dtype=torch.long), torch.ones(6, 2).bfloat16())
                assert ids.tolist() == [[0, 1, 2, 3, 4]] * 6
                assert weights.dtype == torch.float32
                torch.testing.assert_close(weights.sum(-1), torch.ones(6), rtol=1e-6, atol=0)
        logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in importance.parameters())


def test_an_error_inside_leaves_no_hook() -> None:
    model = tiny_model("mixtral")
    implementation = model.get_experts_implementation()
    with (
        pytest.raises(RuntimeError, match="inside"),
        relaxed(model, find_moe_layers(model), importance_of(model), "dense-routed"),
    ):
        raise RuntimeError("inside")
    assert model.get_experts_implementation() == implementation
    for layer in find_moe_layers(model):
        assert not hasattr(layer.experts, "lightning_moe_hooks")
        assert not layer.router._forward_hooks
