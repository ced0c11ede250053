"""How far plans agree (MC-Suite, Fig. 5): a number per pair, and a figure."""

# P plans

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_moe.callbacks.figure_logging import save_figure
from lightning_moe.files import write_json
from lightning_moe.pruning.plan import agreement
from lightning_moe.report.comparison import FULL, Row

COMPARED = ("one-shot", "iterative", "lottery")
"""Strategies whose plans may differ; tuning after one cut changes no plan."""


def write_agreements(folder: Path, rows: Sequence[Row]) -> None:
    """Write agreement.json, and agreement.png with the strategies of each method at each ratio, if there are two.

    Plans of one method, scope, ratio and seed are compared; a strategy without a seed is compared with every seed of
    the other. Means over seeds.
    """
    found: dict[tuple[str, str, float], dict[str, list[Row]]] = {}
    for row in rows:
        if row["status"] == "done" and row["method"] != FULL and row["strategy"] in COMPARED:
            key = (row["method"], row["scope"], row["ratio"])
            found.setdefault(key, {}).setdefault(row["strategy"], []).append(row)
    entries = []
    for (method, scope, ratio), strategies in found.items():
        for one, other in combinations([name for name in COMPARED if name in strategies], 2):
            values = [
                agreement(left["plan"], right["plan"])["all"]
                for left in strategies[one]
                for right in strategies[other]
                if None in (left["seed"], right["seed"]) or left["seed"] == right["seed"]
            ]
            if values:
                names = {"method": method, "scope": scope, "ratio": ratio, "plans": [one, other]}
                entries.append(names | {"agreement": statistics.fmean(values), "seeds": len(values)})
    if not entries:
        for name in ("agreement.json", "agreement.png"):
            (folder / name).unlink(missing_ok=True)
        return
    write_json(folder / "agreement.json", {"version": 1, "agreements": entries})
    save_figure(folder / "agreement.png", agreement_figure(entries))


def agreement_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per pair of strategies: agreement over the ratio dropped, a line per method and scope."""
    pairs = list(dict.fromkeys(tuple(entry["plans"]) for entry in entries))
    figure = Figure(figsize=(1 + 4 * len(pairs), 4), layout="constrained")
    for axes, pair in zip(np.atleast_1d(figure.subplots(1, len(pairs), sharey=True)), pairs, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for entry in entries:
            if tuple(entry["plans"]) == pair:
                lines.setdefault(f"{entry['method']}, {entry['scope']}", []).append(
                    (entry["ratio"], entry["agreement"])
                )
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        chance = sorted({entry["ratio"] for entry in entries})
        axes.plot(chance, [by_chance(ratio) for ratio in chance], "k--", linewidth=0.8, label="by chance")
        axes.set(title=f"{pair[0]} and {pair[1]}", xlabel="share of the experts dropped", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("experts both keep / either keeps")
    return figure


def by_chance(ratio: float) -> float:
    """The agreement of two plans that keep a share ``1 - ratio`` at random, when there are many experts."""
    kept = 1 - ratio
    return kept / (2 - kept)


def matrix_figure(names: Sequence[str], agreement_PP: Sequence[Sequence[float]]) -> Figure:
    """Every plan against every other, as a heat map with its numbers."""
    size = 2.5 + 0.9 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.array(agreement_PP), vmin=0, vmax=1, cmap="viridis")
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    for row in places:
        for column in places:
            value = agreement_PP[row][column]
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="experts both keep / either keeps")
    return figure
