"""Models before and after pruning: what they compute, what they hold, and what of them lies on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch
from tests.helpers.plans import Keep, fewest_plan, non_uniform_plan, uniform_plan

COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

PLANS: dict[str, Callable[[PreTrainedModel], Keep]] = {
    "uniform": uniform_plan,
    "non-uniform": non_uniform_plan,
    "fewest": fewest_plan,
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor | None = None) -> Tensor:
    return model.eval()(tiny_batch() if input_ids is None else input_ids).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, the non-persistent ones included."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def assert_identical(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name


def pruned(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    model = copy.deepcopy(model)
    keep_experts(model, keep)
    return model


@contextmanager
def masked(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    with mask_plan(find_moe_layers(model), keep):
        yield


def in_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, no longer mapped from a file: there tensors lie at odd addresses, where products round
    otherwise (1e-7), and we want to compare exactly."""
    return copy.deepcopy(model).eval()


def stock_load(folder: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return in_memory(model)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def assert_stock(folder: Path, num_experts: int) -> None:
    """Nothing of ours in it: no code, no entry in the config but the count."""
    config = read_config(folder)
    assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    assert not list(folder.glob("*.py"))
    assert [config[name] for name in COUNT_NAMES if name in config] == [num_experts]
    assert not config["architectures"][0].startswith("NonUniform")


def assert_one_line(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"
