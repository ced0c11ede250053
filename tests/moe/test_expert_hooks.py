"""The laws of our experts function: it computes what the stock one does, and gates scale each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.experts import IMPLEMENTATION, ExpertHooks, expert_hooks
from lightning_moe.moe.layers import find_moe_layers
from tests.helpers.families import NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.plans import uniform_plan
from tests.helpers.reference import stock_experts as reference
from tests.moe.pruned_models import every_family, logits_of, masked, pruned


@contextmanager
def our_experts(model: PreTrainedModel, hooks: Mapping[str, ExpertHooks] | None = None) -> Iterator[None]:
    with expert_hooks(model, find_moe_layers(model), hooks or {}):
        yield


@every_family
@pytest.mark.parametrize("gated", [False, True], ids=["no gates", "gates of one"])
def test_our_experts_equal_the_stock_ones(family: str, gated: bool) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    expected = logits_of(model)
    assert expected.std() > 0.05  # otherwise being equal would say little
    names = [layer.name for layer in find_moe_layers(model)]
    with our_experts(model, {name: ExpertHooks(gates_E=torch.ones(NUM_EXPERTS)) for name in names} if gated else {}):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(model), expected)
    assert set(model.get_experts_implementation().values()) == {"eager"}


@every_family
def test_float64_is_float64(family: str) -> None:
    """A sum in float32 somewhere in the experts would show at 1e-10."""
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    expected = logits_of(model)
    with our_experts(model):
        found = logits_of(model)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@every_family
def test_bfloat16_works(family: str) -> None:
    model = tiny_model(family)
    keep = uniform_plan(model)
    with masked(model, keep):
        exact = logits_of(model)
    model = pruned(model.to(torch.bfloat16), keep)
    stock = logits_of(model)
    with our_experts(model):
        ours = logits_of(model)
    assert ours.dtype == torch.bfloat16 and bool(ours.isfinite().all())
    assert (ours - stock).float().norm() < 0.02 * stock.float().norm()
    # Against float32 a few tokens may take another expert; most must not.
    assert (ours.float() - exact).norm() < 0.35 * exact.norm()


@every_family
def test_gradients_equal_the_stock_ones(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    embeddings = model.get_input_embeddings()(tiny_batch()).detach()
    gates = {layer.name: torch.ones(NUM_EXPERTS, requires_grad=True) for layer in find_moe_layers(model)}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        inputs = embeddings.clone().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        return {"inputs": inputs.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with our_experts(model, {name: ExpertHooks(gates_E=gate) for name, gate in gates.items()}):
        found = gradients()
    assert found.keys() == expected.keys()
    assert sum(".experts." in name for name in expected) >= 2 * len(gates)
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )
    assert all(bool((gate.grad != 0).any()) for gate in gates.values())


@every_family
def test_gates_scale_each_expert(family: str) -> None:
    """Outputs and gradients of the gates are those of ``sum_k weight * gate * f(x)``, expert by expert."""
    model = tiny_model(family)
    layer = find_moe_layers(model)[0]
    (call, *_) = reference.watch(model, [(layer.router, layer.experts)], input_ids=tiny_batch(length=8))
    generator = torch.Generator().manual_seed(1)
    gates_E = torch.rand(NUM_EXPERTS, generator=generator) * 2
    gates_E[3] = 0.0
    outputs = []
    for run in ("reference", "ours"):
        gates = gates_E.clone().requires_grad_()
        if run == "ours":
            with our_experts(model, {layer.name: ExpertHooks(gates_E=gates)}):
                output = layer.experts(call.hidden_TH, call.ids_TK, call.weights_TK)
        else:
            output = reference.weighted_sum(layer.experts, call.hidden_TH, call.ids_TK, call.weights_TK, gates)
        output.square().sum().backward()
        outputs.append((output.detach(), gates.grad))
    (expected, expected_grad), (found, found_grad) = outputs
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found_grad, expected_grad, atol=1e-6, rtol=1e-4)


def test_hooks_go_when_the_forward_fails() -> None:
    model = tiny_model("mixtral")
    expected, layers = logits_of(model), find_moe_layers(model)
    hooks = {layers[0].name: ExpertHooks(gates_E=torch.zeros(NUM_EXPERTS))}
    with pytest.raises(RuntimeError, match="stop"), our_experts(model, hooks):
        raise RuntimeError("stop")
    assert IMPLEMENTATION not in model.get_experts_implementation().values()
    assert not hasattr(layers[0].experts, "lightning_moe_hooks")
    assert torch.equal(logits_of(model), expected)
