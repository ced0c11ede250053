"""Layer Drop and Block Drop: whole layers go that change the residual stream least (Expert Trimming, arXiv 2406.02500).

Layer Drop takes out MoE blocks, Block Drop decoder layers that hold one. Both rank layers by the mean cosine between
what goes in and what comes out: the most alike go first.
"""

# E experts

from __future__ import annotations

from typing import Literal

import torch

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.plan import PruningPlan
from lightning_moe.pruning.ratios import named_ratio, ratio_list
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.stats.store import ModelStats


def layer_scores(stats: ModelStats, method: str, drops: Literal["layers", "blocks"]) -> ExpertScores:
    """How much each layer changes the residual stream: 1 less its mean cosine, for all its experts alike.

    Raises ``InputError`` for statistics of an older version, which have no cosines.
    """
    if not stats.has_cosines:
        raise InputError("these statistics are of an older version and know no cosines; score again (--overwrite).")
    similarity = {}
    for layer in stats.layers:
        total = layer.layer_cosine if drops == "layers" else layer.block_cosine
        similarity[layer.shape.name] = float(total / layer.tokens.clamp(min=1))
    shapes = [layer.shape for layer in stats.layers]
    scores = {
        shape.name: torch.full((shape.num_experts,), 1 - similarity[shape.name], dtype=torch.float64)
        for shape in shapes
    }
    settings = {"drops": drops, "similarity": similarity}
    return ExpertScores(stats.model_id, stats.data_fingerprint, method, shapes, scores, settings=settings)


def layer_plan(scores: ExpertScores, ratio: float, scope: str) -> PruningPlan:
    """Drop the layers with the lowest scores, as many as come nearest to ``ratio`` of all experts.

    With the same number of experts in each of ``L`` layers that is ``round(ratio * L)``. Of equal scores the smaller
    layer goes first, then the later one. Raises ``InputError``, with the ratios possible, when that is no layer or all.
    """
    order = sorted(
        scores.shapes, key=lambda shape: (float(scores.scores[shape.name][0]), shape.num_experts, -shape.index)
    )
    count, total = _nearest(order, ratio), sum(shape.num_experts for shape in order)
    if len(order) == 1:
        raise InputError(f"--ratio {ratio}: {order[0].name} is the only MoE layer, and one has to stay.")
    if not 0 < count < len(order):
        gone = [sum(shape.num_experts for shape in order[:number]) for number in range(1, len(order))]
        possible = ratio_list([named_ratio(number, total) for number in gone])
        raise InputError(
            f"--ratio {ratio} drops {count or 'none'} of {len(order)} MoE layers, which go as a whole and of which one "
            f"stays; possible ratios: {possible}."
        )
    names = sorted(order[:count], key=lambda shape: shape.index)
    dropped = [shape.name for shape in names]
    keep = {shape.name: [] if shape.name in dropped else list(range(shape.num_experts)) for shape in scores.shapes}
    made_by = {"method": scores.method, **scores.settings, "ratio": ratio, "scope": scope}
    blocks = dropped if scores.drops == "blocks" else []
    return PruningPlan(keep, scores.model_id, scores.data_fingerprint, made_by, blocks=blocks)


def _nearest(order: list[LayerShape], ratio: float) -> int:
    """How many layers, from the first on, hold about ``ratio`` of all experts; half a layer rounds up."""
    wanted = ratio * sum(shape.num_experts for shape in order) + 1e-6
    gone = count = 0
    for shape in order:
        if gone + shape.num_experts / 2 > wanted:
            break
        gone, count = gone + shape.num_experts, count + 1
    return count
