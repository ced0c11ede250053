"""Observing and gating together; masks that say when they cannot work; the other kind of group-limited router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.experts import ExpertHooks, expert_hooks
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.observation import Observation
from tests.helpers.families import tiny_batch, tiny_model


@torch.no_grad()
def test_observing_inside_gates_keeps_the_gates() -> None:
    model = tiny_model("mixtral")
    layers, ids = find_moe_layers(model), tiny_batch()
    gates = {layer.name: ExpertHooks(gates_E=torch.linspace(0.2, 1.5, 8)) for layer in layers}
    with expert_hooks(model, layers, gates):
        gated = model(ids).logits
        observation = Observation(model)
        observation.next_batch(ids)
        with observation.attached(model):
            assert torch.equal(model(ids).logits, gated)
        assert torch.equal(model(ids).logits, gated)
    assert not any(hasattr(layer.experts, "lightning_moe_hooks") for layer in layers)
    # The shares of REAP are the router's own: a gate does not count twice.
    plain = Observation(model)
    plain.next_batch(ids)
    with plain.attached(model):
        model(ids)
    first = [one.compute()[0].gated_norm_E for one in (observation, plain)]
    torch.testing.assert_close(first[0], first[1])


def test_a_router_that_cannot_be_masked_says_so() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    router = layers[0].router
    stock = type(router).forward

    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids

    router.forward = forward
    assert stock is not None
    with mask_plan(layers, {layers[0].name: [0, 1, 2]}), pytest.raises(InputError, match="cannot be masked"):
        model(tiny_batch())


@torch.no_grad()
def test_pruned_equals_masked_with_groups_limited_greedily() -> None:
    model = tiny_model("deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    layers, ids = find_moe_layers(model), tiny_batch()
    assert layers[0].shape.num_groups == 2
    keep = {layer.name: [0, 2, 3, 5, 6, 7] for layer in layers}
    with mask_plan(layers, keep):
        masked = model(ids).logits
    keep_experts(model, keep)
    torch.testing.assert_close(model(ids).logits, masked, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="same number in every group"):
        keep_experts(model, {layers[0].name: [0, 1, 2, 3, 4]})
