"""The load of every expert at two moments, side by side (MC-Suite, Fig. 6)."""

# L layers, E experts of one layer

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_moe.stats.usage import load_figures, mean_load

Counts = Mapping[str, Sequence[float]]

MOST_BARS = 64
"""Experts of a layer that get a bar each; of more, the sorted curve is drawn."""
COLUMNS = 6


def load_before_and_after(before: Counts, after: Counts, titles: tuple[str, str] = ("before", "after")) -> Figure:
    """A row of panels per moment and a panel per layer: share of the tokens over an even share, largest first.

    Layers may have lost experts in between.
    """
    names = list(after)
    columns = min(COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(1.5 + 2.1 * columns, 1.0 + 3.0 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_visible(False)
    for place, name in enumerate(names):
        line, column = divmod(place, columns)
        for moment, (counts, title, color) in enumerate(
            zip((before, after), titles, ("#4878a8", "#c8763c"), strict=True)
        ):
            axes = grid[2 * line + moment, column]
            axes.set_visible(True)
            _panel(axes, counts[name], color)
            short = f"layer {place}" if moment == 0 else ""
            axes.set_title(f"{short}  cv {load_figures(counts[name])['cv']:.2f}", fontsize=8)
            if column == 0:
                axes.set_ylabel(title, fontsize=8)
    means = [mean_load(counts) for counts in (before, after)]
    figure.suptitle(
        "load of the experts over an even share; mean over layers: "
        + ", ".join(
            f"{title} cv {mean['cv']:.2f}, Gini {mean['gini']:.2f}" for title, mean in zip(titles, means, strict=True)
        ),
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, count_E: Sequence[float], color: str) -> None:
    share_E = np.sort(np.array(count_E))[::-1] * len(count_E) / max(sum(count_E), 1)
    if len(share_E) <= MOST_BARS:
        axes.bar(np.arange(len(share_E)), share_E, color=color, width=0.8)
    else:
        axes.fill_between(np.arange(len(share_E)), share_E, color=color)
    axes.axhline(1.0, color="black", linewidth=0.7, linestyle="--")
    axes.set_xticks([])
    axes.tick_params(labelsize=7)
