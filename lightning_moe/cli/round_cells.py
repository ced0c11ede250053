"""The figures of a cell of ``compare``: of a model that was cut once, or of one moment of a run of rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.pruned_size import pruned_size
from lightning_moe.pruning.round_record import RoundRecord

METHOD_PARTS = ("estimate", "prune", "tune")
"""The parts of a round that are the method's own work."""


def derived_figures(
    figures: Mapping[str, Any], keep: Mapping[str, list[int]], path: str, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """What follows from the measured ``figures`` and the plan: means, sizes, counts."""
    counts = {shape.name: len(keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    return {
        "domain_mean": statistics.fmean(figures["domains"].values()),
        "load_cv": figures["load"]["mean"]["cv"],
        **pruned_size(path, keep),
        "experts": sum(counts.values()),
        "kept_experts": counts,
        "plan": dict(keep),
    }


def figures_of_round(
    records: Sequence[RoundRecord], ratio: float, path: str, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """Of the model at the end of the round that reached ``ratio``."""
    until = next(place for place, record in enumerate(records) if record.ratio == ratio) + 1
    record, so_far = records[until - 1], records[:until]
    assert record.last_moment is not None
    measured = dict(record.perplexity[record.last_moment])
    figures = {"perplexity": measured.pop("all"), **measured, "load": record.final_load}
    parts = [one.seconds.get(part, 0.0) for one in so_far for part in METHOD_PARTS]
    return {
        **figures,
        "load_cv_pruned": record.load["after_prune"]["mean"]["cv"],
        "perplexity_pruned": record.perplexity["after_prune"]["all"],
        "finetune_tokens": sum(one.tokens for one in so_far),
        "finetune_lr": record.lr,
        "rounds": until,
        "method_seconds": sum(parts),
        "comparable": record.made_by["comparable"],
        "made_by": record.made_by,
    } | derived_figures(figures, record.keep, path, shapes)
