"""The scan drawn: what the model loses without each expert, layers by experts (MC-Suite, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure


def scan_figure(perplexity: float, without: Mapping[str, Sequence[float] | None]) -> Figure:
    """The change of perplexity without each expert, from ``perplexity`` with all; None for a layer left out.

    Colours are linear up to the median change and logarithmic beyond it: a few experts matter more than all others.
    """
    rows = [row or [] for row in without.values()]
    width = max(1, *map(len, rows))
    change = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows]) - perplexity
    sizes = np.abs(change[np.isfinite(change)])
    most = max(float(sizes.max(initial=0.0)), 1e-9)
    linear = min(max(float(np.median(sizes)) if sizes.size else 0.0, most / 1000), most)
    figure = Figure(figsize=(3 + min(12, 0.35 * width), 2 + min(12, 0.3 * len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(change, cmap="RdBu_r", norm=SymLogNorm(linear, vmin=-most, vmax=most), aspect="auto")
    axes.set(
        xlabel="expert", ylabel="MoE layer", title=f"perplexity without one expert, from {perplexity:.4g} with all"
    )
    figure.colorbar(image, label="change of perplexity")
    return figure
