"""Ratios and floors that no plan can have are refused, and the ratios that are named instead are possible."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.scores import ExpertScores
from tests.helpers.layer_scores import SCOPES, kept, scores_of


def refusal(scores: ExpertScores, ratio: float, scope: Scope, floor: int | None = None) -> str:
    with pytest.raises(InputError) as refused:
        make_plan(scores, ratio, scope, floor)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float, scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4]]), ratio, scope)
    assert str(ratio) in message and "between 0 and 1" in message


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_that_drops_nothing_is_refused(scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3, 4]]), 0.05, scope)
    assert "drops nothing" in message and "0.25" in message


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_that_drops_too_much_is_refused(scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3, 4]], top_k=2), 0.75, scope)
    assert f"drops {3 if scope == 'layer' else 6}" in message and message.endswith("0.5.")
    assert "top_k=2" in message or scope == "global"


def test_a_layer_that_must_stay_whole_is_named() -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2]], top_k=[1, 2]), 0.5, "layer")
    assert "model.layers.1.mlp" in message and "no expert can be dropped" in message
    message = refusal(scores_of([[1, 2], [1, 2]], top_k=2), 0.5, "global")
    assert "no expert can be dropped" in message


def test_a_floor_above_the_experts_is_refused() -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3]]), 0.25, "global", floor=4)
    assert "--floor 4" in message and "model.layers.1.mlp" in message and "3 experts" in message


REAL = {
    "Mixtral 8x7B": (32, 8, 2, 1, 1),
    "OLMoE": (16, 64, 8, 1, 1),
    "Qwen3-30B-A3B": (48, 128, 8, 1, 1),
    "DeepSeek-V3": (58, 256, 8, 8, 4),
    "DeepSeek-V2-Lite": (26, 64, 6, 1, 1),
    "Kimi-K2": (60, 384, 8, 1, 1),
}
"""Layers, experts, top_k, groups, groups per token."""


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("model", REAL)
def test_the_ratios_named_are_possible(model: str, scope: Scope) -> None:
    """A refusal names ratios; each of them, as it stands there, makes a plan, and they reach to both ends."""
    layers, num_experts, top_k, groups, topk_group = REAL[model]
    generator = torch.Generator().manual_seed(0)
    scores = scores_of(torch.rand(layers, num_experts, generator=generator).tolist(), top_k, groups, topk_group)
    for ratio in (1e-9, 0.999999):
        named = re.findall(r"[\d.e-]*\d", refusal(scores, ratio, scope).partition("possible ratios: ")[2])
        assert 4 <= len(named) <= 20
        for text in named:
            kept(scores, float(text), scope)
        least = sum(len(ids) for ids in kept(scores, float(named[-1]), scope))
        assert least == layers * groups * scores.shapes[0].fewest_per_group
        most = sum(len(ids) for ids in kept(scores, float(named[0]), scope))
        assert most == layers * num_experts - groups * (layers if scope == "layer" else 1)
