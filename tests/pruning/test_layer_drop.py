"""Layer Drop and Block Drop: which layers go, and how many."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.surgery import check_keep
from lightning_moe.pruning.budget import check_ratio, make_plan
from lightning_moe.pruning.scores import Drops, ExpertScores


def scores_of(values: list[float], sizes: list[int], drops: Drops = "layers") -> ExpertScores:
    shapes = [LayerShape(f"model.layers.{i}.mlp", i, size, 2) for i, size in enumerate(sizes)]
    scores = {
        shape.name: torch.full((shape.num_experts,), value, dtype=torch.float64)
        for shape, value in zip(shapes, values, strict=True)
    }
    return ExpertScores("tiny@0", "data@0", "layer-drop", shapes, scores, settings={"drops": drops})


@given(
    values=st.lists(st.floats(0, 1), min_size=2, max_size=12, unique=True),
    ratio=st.floats(0.01, 0.99),
    experts=st.integers(2, 9),
)
def test_with_layers_alike_round_of_the_ratio_go(values: list[float], ratio: float, experts: int) -> None:
    scores = scores_of(values, [experts] * len(values))
    count = math.floor(ratio * len(values) + 0.5)
    if abs(ratio * len(values) + 0.5 - round(ratio * len(values) + 0.5)) < 1e-5:
        return  # on the edge, where floats may fall to either side
    if not 0 < count < len(values):
        with pytest.raises(InputError, match="possible ratios"):
            make_plan(scores, ratio, "global")
        with pytest.raises(InputError, match="possible ratios"):
            check_ratio(scores.shapes, ratio, "global", drops="layers")
        return
    plan = make_plan(scores, ratio, "global")
    lowest = sorted(range(len(values)), key=lambda i: values[i])[:count]
    assert [name for name, ids in plan.keep.items() if not ids] == [f"model.layers.{i}.mlp" for i in sorted(lowest)]
    assert all(ids in ([], list(range(experts))) for ids in plan.keep.values())
    check_keep(scores.shapes, plan.keep)
    check_ratio(scores.shapes, ratio, "global", drops="layers")


@pytest.mark.parametrize(
    ("ratio", "gone"), [(0.1, [1]), (0.19, [1]), (0.2, [0, 1]), (0.39, [0, 1]), (0.4, [0, 1, 2]), (0.74, [0, 1, 2])]
)
def test_layers_of_unlike_sizes_by_hand(ratio: float, gone: list[int]) -> None:
    """4, 8, 8 and 20 experts of 40, in the order of scores: each layer goes once half of it is due, at 2, 8, 16, 30."""
    plan = make_plan(scores_of([0.2, 0.1, 0.3, 0.9], [8, 4, 8, 20]), ratio, "global")
    assert [index for index, ids in enumerate(plan.keep.values()) if not ids] == gone


def test_blocks_go_as_a_whole() -> None:
    plan = make_plan(scores_of([0.5, 0.1, 0.3], [4, 4, 4], "blocks"), 0.34, "global")
    assert plan.blocks == ["model.layers.1.mlp"] and plan.keep["model.layers.1.mlp"] == []
    assert plan.made_by["drops"] == "blocks" and plan.made_by["scope"] == "global"
    check_keep(scores_of([0.0] * 3, [4] * 3).shapes, plan.keep, plan.blocks)


def test_of_equal_layers_the_later_goes() -> None:
    plan = make_plan(scores_of([0.5, 0.5, 0.5], [4, 4, 4]), 1 / 3, "global")
    assert [name for name, ids in plan.keep.items() if not ids] == ["model.layers.2.mlp"]


def test_refusals_name_what_is_possible() -> None:
    for ratio, said in ((0.1, "drops none"), (0.9, "drops 4")):
        with pytest.raises(InputError, match=said) as refused:
            make_plan(scores_of([0.1, 0.2, 0.3, 0.4], [8] * 4), ratio, "global")
        assert "0.25, 0.5, 0.75" in str(refused.value)
    with pytest.raises(InputError, match="only MoE layer"):
        make_plan(scores_of([0.1], [8]), 0.5, "global")
