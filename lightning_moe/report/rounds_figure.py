"""A run of rounds drawn: perplexity and load skew, before and after each cut and each tuning."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_moe.pruning.round_record import MOMENTS, RoundRecord

NAMES = dict(zip(MOMENTS, ("before pruning", "after pruning", "after tuning"), strict=True))


def rounds_figure(records: Sequence[RoundRecord]) -> Figure:
    """Perplexity above, coefficient of variation of the load below; a saw tooth a round."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, values in ((upper, _perplexities(records)), (lower, _load_cvs(records))):
        axes.plot(*zip(*sorted(point for points in values.values() for point in points), strict=True), color="#888888")
        for name, points in values.items():
            axes.plot(*zip(*points, strict=True), "o", label=name)
        axes.grid(alpha=0.25)
    upper.set(ylabel="perplexity")
    upper.legend()
    lower.set(ylabel="load: standard deviation over mean", xlabel="round (share of the experts dropped)")
    lower.set_xticks([record.round for record in records], [f"{r.round}\n{100 * r.ratio:.3g}%" for r in records])
    return figure


def _perplexities(records: Sequence[RoundRecord]) -> dict[str, list[tuple[float, float]]]:
    return _points(records, {r.round: {m: r.perplexity[m]["all"] for m in r.perplexity} for r in records})


def _load_cvs(records: Sequence[RoundRecord]) -> dict[str, list[tuple[float, float]]]:
    return _points(records, {r.round: {m: r.load[m]["mean"]["cv"] for m in r.load} for r in records})


def _points(
    records: Sequence[RoundRecord], values: dict[int, dict[str, float]]
) -> dict[str, list[tuple[float, float]]]:
    """By moment, where there are any: a place on the axis, a third of a round apart, and the value there."""
    found = {
        NAMES[moment]: [
            (record.round + 0.35 * (place - 1), values[record.round][moment])
            for record in records
            if moment in values[record.round]
        ]
        for place, moment in enumerate(MOMENTS)
    }
    return {name: points for name, points in found.items() if points}
