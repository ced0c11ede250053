"""Routers that are watched or rewritten: experts get what they are given, all else stays, and no hook does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing, rewrite_weights
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import fewest_plan


def recorded(model: PreTrainedModel, ids: Tensor) -> list[Routing]:
    routings: list[Routing] = []
    with record_routing(find_moe_layers(model), lambda _, one: routings.append(one)), torch.no_grad():
        model(ids)
    return routings


@pytest.mark.parametrize("family", FAMILIES)
def test_rewritten_weights_are_those_that_experts_get(family: str) -> None:
    """The first layer's experts see the weights it is given, ids and logits stay, and afterwards all is as before."""
    model, ids = tiny_model(family), tiny_batch(length=8)
    layers, before = find_moe_layers(model), recorded(model, ids)
    with torch.no_grad():
        logits = model(ids).logits
        with rewrite_weights(layers, lambda layer, routing: None):
            assert torch.equal(model(ids).logits, logits)
        with rewrite_weights(layers[:1], lambda layer, routing: 2 * routing.weights_TK):
            first = recorded(model, ids)[0]
            assert not torch.allclose(model(ids).logits, logits)
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(first.weights_TK, 2 * before[0].weights_TK)
    assert torch.equal(first.expert_ids_TK, before[0].expert_ids_TK)
    assert torch.equal(first.logits_TE, before[0].logits_TE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_told_from_weights_where_every_expert_is_chosen(family: str) -> None:
    """Both have the same shape then. The logits of a layer cut to ``top_k`` experts are the kept columns of before."""
    model, ids = tiny_model(family), tiny_batch(length=8)
    whole, keep = recorded(model, ids)[0], fewest_plan(model)
    name = find_moe_layers(model)[0].name
    keep_experts(model, keep)
    cut = recorded(model, ids)[0]
    torch.testing.assert_close(cut.logits_TE, whole.logits_TE[:, keep[name]], rtol=1e-5, atol=1e-6)


def test_an_exception_leaves_no_hook() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)

    def refuse(layer: MoELayer, routing: Routing) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), rewrite_weights(layers, refuse):
        model(tiny_batch(length=8))
    assert not any(layer.router._forward_hooks for layer in layers)


def test_what_a_recorder_returns_changes_nothing() -> None:
    """A hook's result would take the place of the router's output."""
    model, ids = tiny_model("mixtral"), tiny_batch(length=8)
    found: dict[str, Routing] = {}
    with torch.no_grad():
        expected = model(ids).logits
        with record_routing(find_moe_layers(model), lambda layer, one: found.setdefault(layer.name, one)):
            assert torch.equal(model(ids).logits, expected)
