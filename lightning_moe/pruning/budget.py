"""Budget: from scores to a plan, with exact counts."""

# E experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.layer_drop import layer_plan
from lightning_moe.pruning.plan import PruningPlan
from lightning_moe.pruning.ratios import named_ratio, ratio_list, rounded
from lightning_moe.pruning.scores import Drops, ExpertScores

Scope = Literal["layer", "global"]


def make_plan(
    scores: ExpertScores,
    ratio: float,
    scope: Scope,
    floor: int | None = None,
    whole: Sequence[LayerShape] | None = None,
) -> PruningPlan:
    """Drop the experts with the lowest scores.

    ``layer`` drops ``round(ratio * E)`` in every layer, ``global`` drops ``round(ratio * sum of E)`` in one order
    over all layers (DiEP, eq. 11), where no layer goes below ``floor`` experts (default: what its router needs,
    which is ``top_k``). Group-limited routers lose the same number in each group, so they drop in whole slices, the
    lowest of every group together at their mean score. Of equal scores the lower id stays.

    ``whole`` are the layers as they were before any round of pruning: the ratio is then a share of those, what earlier
    rounds dropped counts as dropped, and a round may spare a layer. The plan names experts as the scores do.

    Scores of whole layers drop these, see ``layer_plan``.

    Raises ``InputError``, with the ratios possible, when the ratio drops nothing, more than the floors allow, or a
    number that the groups cannot share; and for scores of sets that were chosen for another ratio.
    """
    if not 0 < ratio < 1:
        raise InputError(f"--ratio {ratio}: the fraction of experts to drop must lie between 0 and 1, both excluded.")
    if scores.drops != "experts":
        return layer_plan(scores, ratio, scope)
    made_for = scores.settings.get("for_ratio", ratio)
    if made_for != ratio or ("for_ratio" in scores.settings and scope != "layer"):
        raise InputError(
            f"--ratio {ratio} --scope {scope}: {scores.method} has chosen sets of experts for ratio {made_for} and "
            "scope layer alone; give these, or search anew."
        )
    slices = {shape.name: _slices(shape, scores.scores[shape.name].tolist()) for shape in scores.shapes}
    most = {shape.name: _most_slices(shape, floor) for shape in scores.shapes}
    before = {shape.name: shape.num_experts for shape in whole or scores.shapes}
    if scope == "layer":
        drops = {
            shape.name: _layer_slices(shape, ratio, most[shape.name], before[shape.name]) for shape in scores.shapes
        }
        if not any(drops.values()):
            raise InputError(f"--ratio {ratio} drops nothing more than the rounds before; take fewer rounds.")
    else:
        drops = _global_slices(scores, ratio, slices, most, sum(before.values()))
    keep = {}
    for shape in scores.shapes:
        dropped = {expert for _, experts in slices[shape.name][: drops[shape.name]] for expert in experts}
        keep[shape.name] = [expert for expert in range(shape.num_experts) if expert not in dropped]
    made_by = {"method": scores.method, **scores.settings, "ratio": ratio, "scope": scope, "floor": floor}
    return PruningPlan(keep, scores.model_id, scores.data_fingerprint, made_by)


def check_ratio(
    shapes: Sequence[LayerShape], ratio: float, scope: Scope, floor: int | None = None, drops: Drops = "experts"
) -> None:
    """Raise ``InputError``, as ``make_plan`` would, when no scores can give such a plan.

    The counts to drop do not depend on the scores, so equal ones tell.
    """
    make_plan(blank_scores(shapes, drops), ratio, scope, floor)


def blank_scores(shapes: Sequence[LayerShape], drops: Drops = "experts") -> ExpertScores:
    """Scores that prefer no expert, nor layer."""
    zeros = {shape.name: torch.zeros(shape.num_experts, dtype=torch.float64) for shape in shapes}
    return ExpertScores("", "", "", shapes, zeros, settings={} if drops == "experts" else {"drops": drops})


def _slices(shape: LayerShape, scores: list[float]) -> list[tuple[float, list[int]]]:
    """What can be dropped together, lowest first: single experts, or one of each group."""
    groups = [
        sorted(range(first, first + shape.group_size), key=lambda expert: (scores[expert], -expert))
        for first in range(0, shape.num_experts, shape.group_size)
    ]
    return [
        (sum(scores[expert] for expert in experts) / len(experts), list(experts))
        for experts in zip(*groups, strict=True)
    ]


def _most_slices(shape: LayerShape, floor: int | None) -> int:
    fewest = shape.fewest_per_group
    if floor is not None:
        if floor < 1:
            raise InputError(f"--floor {floor}: a layer keeps at least 1 expert.")
        if floor > shape.num_experts:
            raise InputError(f"--floor {floor}: {shape.name} has only {shape.num_experts} experts.")
        fewest = max(fewest, -(-floor // shape.num_groups))
    return max(0, shape.group_size - fewest)


def _layer_slices(shape: LayerShape, ratio: float, most: int, before: int) -> int:
    gone = before - shape.num_experts
    count = rounded(ratio * before) - gone
    if count % shape.num_groups == 0 and (0 if gone else 1) <= count // shape.num_groups <= most:
        return count // shape.num_groups
    group, gone = before // shape.num_groups, gone // shape.num_groups
    possible = [named_ratio(drop, group) for drop in range(gone + 1, gone + most + 1)]
    where = f"{shape.name} ({before} experts, top_k={shape.top_k})"
    raise InputError(_refusal(ratio, count, where, possible))


def _global_slices(
    scores: ExpertScores,
    ratio: float,
    slices: dict[str, list[tuple[float, list[int]]]],
    most: dict[str, int],
    total: int,
) -> dict[str, int]:
    gone = total - sum(shape.num_experts for shape in scores.shapes)
    count = rounded(ratio * total) - gone
    limit = sum(most[shape.name] * shape.num_groups for shape in scores.shapes)
    step = max(shape.num_groups for shape in scores.shapes)
    if count % step or not step <= count <= limit:
        where = f"all {len(scores.shapes)} layers ({total} experts)"
        possible = [named_ratio(drop, total) for drop in range(gone + step, gone + limit + 1, step)]
        raise InputError(_refusal(ratio, count, where, possible))
    order = sorted(
        (score, -shape.index, turn, shape)
        for shape in scores.shapes
        for turn, (score, _) in enumerate(slices[shape.name][: most[shape.name]])
    )
    drops = {shape.name: 0 for shape in scores.shapes}
    for *_, shape in order:
        if count >= shape.num_groups:
            drops[shape.name] += 1
            count -= shape.num_groups
    return drops


def _refusal(ratio: float, count: int, where: str, possible: list[str]) -> str:
    if not possible:
        return f"--ratio {ratio}: {where}: no expert can be dropped without going below the floor."
    what = "drops nothing" if count < 1 else f"drops {count}, which the router's groups and the floor do not allow,"
    return f"--ratio {ratio} {what} in {where}; possible ratios: {ratio_list(possible)}."
