"""Statistics of a tiny model, and how near two of them must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats.layer_stats import TENSORS, LayerStats
from lightning_moe.stats.observation import Observation

WEIGHT_FIELDS = ("router_norm_E", "weight_norm_E", "weight_cosine_EE", "stable_rank_E")
COUNTS = ("tokens", "count_E", "together_EE", "seen_EV", "outliers_E")
"""Whole numbers: no rounding excuses a difference."""

FOUR = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"]


def parts(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    return [(layer.router, layer.experts) for layer in find_moe_layers(model)]


def observe(
    model: PreTrainedModel, batches: Iterable[Tensor | tuple[Tensor, Tensor]], into: Observation | None = None
) -> list[LayerStats]:
    observation = into or Observation(model)
    with torch.no_grad(), observation.attached(model):
        for batch in batches:
            input_ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            observation.next_batch(input_ids, mask)
            model(input_ids, attention_mask=mask)
    return observation.compute()


def assert_near_bins(found: Tensor, expected: Tensor) -> None:
    """Rounding may carry a token over the edge of its bin, no further."""
    below, expected_below = found.cumsum(0), expected.cumsum(0)
    assert below[-1] == expected_below[-1]
    assert bool((below[1:] >= expected_below[:-1]).all() and (below[:-1] <= expected_below[1:]).all())


def assert_field(name: str, found: Tensor, expected: Any, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    if name in COUNTS:
        assert torch.equal(found, expected), f"{name}: {found} is not {expected}"
        return
    if name == "ratio_R":
        assert_near_bins(found, expected)
        return
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(
        found, expected, atol=tolerance * scale, rtol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def assert_same(found: LayerStats, expected: LayerStats, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    for name in TENSORS:
        assert getattr(found, name).shape == getattr(expected, name).shape, name
        assert_field(name, getattr(found, name), getattr(expected, name), tolerance)
