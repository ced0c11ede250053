"""Scores written out, layer by layer, and what a plan by them keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.surgery import check_keep
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.scores import ExpertScores

SCOPES: tuple[Scope, Scope] = ("layer", "global")


def scores_of(
    values: Sequence[Sequence[float]],
    top_k: int | Sequence[int] = 1,
    num_groups: int = 1,
    topk_group: int = 1,
    **settings: Any,
) -> ExpertScores:
    """Layers 0, 1, 2 ... with these scores."""
    top_ks = [top_k] * len(values) if isinstance(top_k, int) else top_k
    shapes = [
        LayerShape(f"model.layers.{i}.mlp", i, len(row), k, num_groups, topk_group)
        for i, (row, k) in enumerate(zip(values, top_ks, strict=True))
    ]
    tensors = {shape.name: torch.tensor(row, dtype=torch.float64) for shape, row in zip(shapes, values, strict=True)}
    return ExpertScores("tiny@01", "data@23", "reap", shapes, tensors, settings={"direction": "min", **settings})


def kept(scores: ExpertScores, ratio: float, scope: Scope, floor: int | None = None) -> list[list[int]]:
    """Kept ids per layer, after what every plan must hold."""
    plan = make_plan(scores, ratio, scope, floor)
    assert list(plan.keep) == [shape.name for shape in scores.shapes]
    check_keep(scores.shapes, plan.keep)
    for ids in plan.keep.values():
        assert ids == sorted(ids) and all(type(i) is int for i in ids)
    assert (plan.model_id, plan.data_fingerprint) == ("tiny@01", "data@23")
    return list(plan.keep.values())
