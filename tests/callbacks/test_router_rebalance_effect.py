"""What RouterRebalance is for: load evens out, and routers become sure of fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.callbacks.router_rebalance import RouterRebalance
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.router_losses import gate_entropy_loss
from lightning_moe.moe.routing import Routing, record_routing
from tests.callbacks.rebalance_fit import Foreign
from tests.callbacks.router_fit import loader, trainer
from tests.helpers.families import tiny_model
from tests.helpers.training_models import training_model


def slow_cv(model: PreTrainedModel) -> float:
    """Standard deviation over mean of each layer's load by the text, averaged over layers."""
    counts: dict[str, list[int]] = {}

    def record(layer: Any, routing: Routing) -> None:
        count_E = counts.setdefault(layer.name, [0] * layer.num_experts)
        for expert in routing.expert_ids_TK.flatten().tolist():
            count_E[expert] += 1

    with record_routing(find_moe_layers(model), record), torch.no_grad():
        for batch in loader(masked=False):
            model(batch["input_ids"])
    found = []
    for count_E in counts.values():
        mean = sum(count_E) / len(count_E)
        found.append((sum((count - mean) ** 2 for count in count_E) / len(count_E)) ** 0.5 / mean)
    return sum(found) / len(found)


def skewed_model(family: str) -> PreTrainedModel:
    """Two experts of every layer are liked by all tokens."""
    model = tiny_model(family)
    for layer in find_moe_layers(model):
        inputs: list[Tensor] = []
        hook = layer.router.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(next(iter(loader(masked=False)))["input_ids"])
        hook.remove()
        mean_H = inputs[0].flatten(0, -2).mean(0)
        with torch.no_grad():
            layer.router_weight[:2] += 2 * mean_H / mean_H.norm()
    return model


@pytest.mark.parametrize(("train", "lr"), [("all", 0.05), ("routers", 0.3)])
def test_a_skewed_router_is_evened_out(tmp_path: Path, train: Any, lr: float) -> None:
    found = []
    for weight in (0.0, 1.0):
        model = skewed_model("mixtral").train()
        before = slow_cv(model)
        guest = RouterRebalance(weight, train=train)
        trainer(tmp_path, guest, max_epochs=10).fit(Foreign(model, lr), loader(masked=False))
        found.append(slow_cv(model))
    assert before > 0.6
    assert found[1] < 0.6 * before
    assert found[1] < 0.6 * found[0]


def mean_entropy(model: PreTrainedModel) -> float:
    """Of the gates, from 0 to 1, over layers and all tokens."""
    routings: list[Routing] = []
    with torch.no_grad(), record_routing(find_moe_layers(model), lambda _, routing: routings.append(routing)):
        for batch in loader(masked=False):
            model(batch["input_ids"])
    return sum(float(gate_entropy_loss(routing)) for routing in routings) / len(routings)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_routers_become_sure_of_fewer_experts(tmp_path: Path, family: str) -> None:
    """Far more than the same training does without; also of a model that was cut."""
    found = []
    for weight in (0.0, 1.0):
        model = training_model(family, pruned=True)
        before = mean_entropy(model)
        guest = RouterRebalance(0.0, entropy=weight)
        trainer(tmp_path, guest, max_epochs=6).fit(Foreign(model), loader(masked=False))
        found.append(mean_entropy(model))
    assert before > 0.3
    assert found[1] < 0.8 * min(before, found[0])


def test_biases_even_out_a_skewed_router(tmp_path: Path) -> None:
    model = skewed_model("deepseek_v3").train()
    before = slow_cv(model)
    trainer(tmp_path, RouterRebalance(bias_step=0.05), max_epochs=8).fit(Foreign(model, lr=0.0), loader(masked=False))
    assert slow_cv(model) < 0.8 * before
