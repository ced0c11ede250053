"""RouterReplay: what the masked router itself decides, bit by bit, without its linear map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.router_replay import RouterReplay, record_replays
from lightning_moe.moe.routing import Routing, mask_experts, record_routing
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import fewest_plan, uniform_plan


def replays_of(model: PreTrainedModel, layers: list[MoELayer]) -> tuple[dict[str, RouterReplay], dict[str, Any]]:
    """Of one forward, with the arguments that the routers were given."""
    found: dict[str, RouterReplay] = {}
    given: dict[str, Any] = {}
    handles = [
        layer.router.register_forward_pre_hook(
            lambda module, args, kwargs, name=layer.name: given.update({name: (args, kwargs)}), with_kwargs=True
        )
        for layer in layers
    ]
    contexts = [record_replays(one, lambda replay, name=one.name: found.update({name: replay})) for one in layers]  # type: ignore[misc]
    for context in contexts:
        context.__enter__()
    model(tiny_batch())
    for context in contexts:
        context.__exit__(None, None, None)
    for handle in handles:
        handle.remove()
    return found, given


def dense(routing: Routing, num_experts: int) -> Tensor:
    weights_TE = torch.zeros(len(routing.expert_ids_TK), num_experts, dtype=torch.float64)
    return weights_TE.scatter_add_(1, routing.expert_ids_TK, routing.weights_TK.double())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_the_masked_router(family: str) -> None:
    model = tiny_model(family)
    layers = find_moe_layers(model)
    replays, given = replays_of(model, layers)
    everything = {layer.name: list(range(layer.num_experts)) for layer in layers}
    for keep in (everything, uniform_plan(model), fewest_plan(model)):
        for layer in layers:
            seen: list[Tensor] = []
            args, kwargs = given[layer.name]
            with (
                record_routing([layer], lambda layer, routing, seen=seen: seen.append(dense(routing, 8))),  # type: ignore[misc]
                mask_experts(layer, keep[layer.name]),
            ):
                layer.router(*args, **kwargs)
            found = replays[layer.name].weights(keep[layer.name])
            assert torch.equal(found, seen[0])
            assert len(seen) == 1  # nobody who watches the router sees the replay
            some = torch.tensor([3, 5, 40])
            of_some = replays[layer.name].rows(some, "cpu").weights(keep[layer.name])
            assert torch.equal(of_some != 0, seen[0][some] != 0)
            torch.testing.assert_close(of_some, seen[0][some], rtol=1e-6, atol=0)  # a CPU's last bit goes by the rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_in_low_and_mixed_precision(dtype: torch.dtype) -> None:
    """bfloat16 weights, and float32 ones under autocast: logits in a type of their own."""
    for family in ("mixtral", "deepseek_v3"):
        model = tiny_model(family).to(dtype)
        layers = find_moe_layers(model)
        seen: dict[str, Tensor] = {}
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32),
            record_routing(layers, lambda layer, routing, seen=seen: seen.update({layer.name: dense(routing, 8)})),  # type: ignore[misc]
        ):
            replays, _ = replays_of(model, layers)
            for layer in layers:
                assert torch.equal(replays[layer.name].weights(range(8)), seen[layer.name])


@torch.no_grad()
def test_the_router_is_left_as_it_was() -> None:
    model = tiny_model("deepseek_v3")
    layer = find_moe_layers(model)[0]
    before = set(vars(layer.router)), [bias.clone() for bias in layer.correction_biases], model(tiny_batch()).logits
    replays, _ = replays_of(model, [layer])
    replays[layer.name].weights([0, 1, 4, 5])
    assert set(vars(layer.router)) == before[0]
    assert all(torch.equal(one, other) for one, other in zip(layer.correction_biases, before[1], strict=True))
    assert torch.equal(model(tiny_batch()).logits, before[2])


@torch.no_grad()
def test_recording_inside_a_mask_leaves_the_mask() -> None:
    model = tiny_model("mixtral")
    layer = find_moe_layers(model)[0]
    with mask_experts(layer, [0, 1, 2]):
        masked = model(tiny_batch()).logits
        replays_of(model, [layer])
        assert torch.equal(model(tiny_batch()).logits, masked)


def test_a_router_without_a_linear_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = find_moe_layers(tiny_model("mixtral"))[0]
    monkeypatch.setattr(type(layer.router), "forward", lambda self, hidden: hidden @ self.weight.T)
    with record_replays(layer, lambda replay: None), pytest.raises(InputError, match="linear map"):
        layer.router(torch.zeros(3, 32))
    assert isinstance(layer.router, nn.Module) and "forward" not in vars(layer.router)
