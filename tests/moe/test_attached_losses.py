"""A loss attached to a forward trains as one that is added by hand, in every family and every way to run experts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.router_losses import attach_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, record_routing, rewrite_weights
from tests.helpers.families import FAMILIES, tiny_batch
from tests.helpers.training_models import training_model

SCALE = 0.3


def step_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    torch.manual_seed(3)  # PhiMoE draws random numbers while it trains
    loss: Tensor = model(ids, use_cache=False).logits.float().log_softmax(-1)[..., 5].square().mean()
    return loss


def auxiliary(layers: Sequence[MoELayer], routing: Routing) -> Tensor:
    return (load_balance_loss(routing) + 0.1 * router_z_loss(routing)) / len(layers)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_loss_trains_as_one_that_is_added(family: str, recompute: bool) -> None:
    """Bit by bit the same forward, and the gradients of ``loss + scale * auxiliary`` for every weight."""
    ids = tiny_batch(length=12)
    added, attached = training_model(family, True, recompute), training_model(family, True, recompute)
    layers, routings = find_moe_layers(added), []
    with record_routing(layers, lambda _, routing: routings.append(routing)):
        loss = step_loss(added, ids)
    (loss + SCALE * sum(auxiliary(layers, one) for one in routings)).backward()

    own = find_moe_layers(attached)
    with rewrite_weights(own, lambda _, one: attach_loss(one.weights_TK, auxiliary(own, one), SCALE)):
        carried = step_loss(attached, ids)
        carried.backward()
    assert torch.equal(carried, loss)

    expected, found = gradients(added), gradients(attached)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)

    plain = training_model(family, True, recompute)  # the auxiliary loss is really in it
    step_loss(plain, ids).backward()
    for layer, bare in zip(own, find_moe_layers(plain), strict=True):
        assert not torch.allclose(layer.router_weight.grad, bare.router_weight.grad, rtol=1e-2, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_an_attached_loss_suits_every_way_to_run_experts(implementation: str) -> None:
    found = []
    for attach in (False, True):
        model = training_model("mixtral", pruned=True)
        model.set_experts_implementation(implementation)
        layers, ids = find_moe_layers(model), tiny_batch(length=12)
        if attach:
            with rewrite_weights(layers, lambda _, one, all_=layers: attach_loss(one.weights_TK, auxiliary(all_, one))):
                step_loss(model, ids).backward()
        else:
            routings: list[Routing] = []
            with record_routing(layers, lambda _, one, routings=routings: routings.append(one)):
                loss = step_loss(model, ids)
            (loss + sum(auxiliary(layers, one) for one in routings)).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_by_hand(dtype: torch.dtype) -> None:
    """carrier x, loss l, both with gradients: after (2 x).sum() the gradient of x is 2, of l the scale; twice attached,
    both count; and a loss with no way back asks for nothing."""
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    one, two = (torch.tensor(value, requires_grad=True) for value in (5.0, 7.0))
    carried = attach_loss(attach_loss(attach_loss(x, one, 0.25), two), torch.tensor(9.0), 3.0)
    assert torch.equal(carried, x) and carried.dtype == dtype
    (2 * carried).sum().backward()
    assert x.grad.tolist() == [2, 2] and x.grad.dtype == dtype
    assert (float(one.grad), float(two.grad)) == (0.25, 1.0)
