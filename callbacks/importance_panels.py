"""The figures of a DiEP search: curves, distributions, and the heat map of all experts with the kept ones marked.

Made with matplotlib's objects, never with pyplot: no window, no global state of anybody else's program is touched.
"""

# L layers, E experts of one layer, S snapshots

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_moe.callbacks.importance_curve import ImportanceCurve

MOST_IN_LEGEND = 10
"""Layers that are named in a legend; more get a colour bar."""
MOST_LINES = 400
"""Experts that are drawn one by one; of more, the highest, the median and the lowest of each layer."""


def curves(curve: ImportanceCurve) -> Figure:
    """Alpha above, beta below, over the steps."""
    names, steps = list(curve.alphas), np.array(curve.steps)
    colors = _layer_colors(len(names))
    figure = Figure(figsize=(10, 8), layout="constrained")
    alpha_axes, beta_axes = figure.subplots(2, 1, sharex=True)
    experts = sum(past[-1].shape[0] for past in curve.alphas.values())
    each = experts <= MOST_LINES
    lines = []
    for name, color in zip(names, colors, strict=True):
        alpha_SE = curve.alpha_SE(name).numpy()
        shown = alpha_SE.T if each else np.quantile(alpha_SE, (0, 0.5, 1), axis=1)
        lines += [(place, np.column_stack([steps, values]), color) for place, values in enumerate(shown)]
        beta_axes.plot(steps, curve.betas[name], color=color, linewidth=1.4)
    lines.sort(key=lambda line: line[0])  # the layers in turn, lest the deepest cover all others
    _, segments, line_colors = zip(*lines, strict=True)
    alpha_axes.add_collection(LineCollection(segments, colors=line_colors, linewidths=0.9))
    alpha_axes.autoscale_view()
    what = "every expert" if each else "the highest, median and lowest expert of every layer"
    alpha_axes.set(title=f"alpha of {what}", ylabel="alpha")
    beta_axes.set(title="beta of every layer", ylabel="beta", xlabel="optimiser step")
    beta_axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (alpha_axes, beta_axes):
        axes.grid(alpha=0.25)
    _name_layers(figure, [alpha_axes, beta_axes], names, colors)
    return figure


def distributions(curve: ImportanceCurve) -> Figure:
    """Where alpha and beta end: by layer on the left, all of them counted on the right."""
    names = list(curve.alphas)
    label, shorts = _short_names(names)
    colors = _layer_colors(len(names))
    width = min(16.0, max(9.0, 0.3 * len(names) + 4))
    figure = Figure(figsize=(width, 8), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", width_ratios=[4, 1])
    alphas = [past[-1].numpy() for past in curve.alphas.values()]
    betas = np.array([past[-1] for past in curve.betas.values()])
    for place, (alpha_E, color) in enumerate(zip(alphas, colors, strict=True)):
        # A fixed spread by expert id: the same numbers give the same picture.
        spread = (np.arange(len(alpha_E)) * 0.618 % 1 - 0.5) * 0.5
        grid[0, 0].scatter(
            place + spread, alpha_E, s=9 if len(alpha_E) > 16 else 25, color=color, linewidths=0, alpha=0.8
        )
        grid[0, 0].hlines(np.median(alpha_E), place - 0.35, place + 0.35, color="black", linewidth=1.2)
    grid[0, 0].set(title=f"alpha after step {curve.steps[-1]}, a dot for each expert, a bar at the median")
    grid[1, 0].vlines(range(len(names)), 1, betas, color=colors, linewidth=2)
    grid[1, 0].scatter(range(len(names)), betas, s=30, color=colors, zorder=3)
    grid[1, 0].axhline(1, color="black", linewidth=0.8)
    grid[1, 0].set(title="beta, from 1 as in the pretrained model", ylabel="beta", xlabel=label)
    grid[0, 0].set_ylabel("alpha")
    for axes in grid[:, 0]:
        _tick_names(axes, "x", shorts, room=max(10, int(2.6 * width)))
        axes.set_xlim(-0.6, len(names) - 0.4)
    for axes, values, what in ((grid[0, 1], np.concatenate(alphas), "experts"), (grid[1, 1], betas, "layers")):
        finite = values[np.isfinite(values)]
        axes.hist(finite, bins=min(40, max(5, len(finite) // 4)), orientation="horizontal", color="0.55")
        axes.set(xlabel=what, title=f"{len(values):,} {what}")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in grid.flat:
        axes.grid(axis="y", alpha=0.25)
    return figure


def experts(gates: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]] | None) -> Figure:
    """``E * softmax(alpha) * beta`` of all experts, a row for each layer; the kept ones dotted and counted."""
    names, total, most = list(gates), sum(map(len, gates.values())), max(map(len, gates.values()))
    label, shorts = _short_names(names)
    wide, tall = min(0.45, max(0.13, 11 / most)), min(0.45, max(0.17, 9 / len(names)))  # of a cell, in inches
    width, height = max(5.0, wide * most), max(2.0, tall * len(names))
    figure = Figure(figsize=(width + (4.0 if keep is not None else 2.4), height + 1.6), layout="constrained")
    if keep is None:
        axes = figure.subplots()
        panels = [axes]
        axes.set_title(f"importance of {total:,} experts")
    else:
        axes, bars = panels = figure.subplots(1, 2, sharey=True, width_ratios=[width, 1.6])
        _count_kept(bars, [len(keep[name]) for name in names], [len(gate_E) for gate_E in gates.values()], most)
        kept = sum(map(len, keep.values()))
        axes.set_title(f"importance of {total:,} experts; a dot marks the {kept:,} kept ({kept / total:.1%})")
        marks = [(expert, place) for place, name in enumerate(names) for expert in keep[name]]
        size = (0.36 * 72 * min(wide, tall)) ** 2  # square points
        axes.scatter(*zip(*marks, strict=True), s=size, color="black", edgecolors="white", linewidths=0.4)
    gates_LE = np.full((len(names), most), np.nan)
    for row_E, gate_E in zip(gates_LE, gates.values(), strict=True):
        row_E[: len(gate_E)] = gate_E.numpy()
    # One expert far above all others would leave the rest without colour.
    finite = gates_LE[np.isfinite(gates_LE)]
    low, high = np.quantile(finite, (0.005, 0.995)) if finite.size else (1.0, 1.0)
    low, high = min(low, 0.99), max(high, 1.01)
    axes.set_facecolor("0.85")
    image = axes.imshow(gates_LE, cmap="PuOr", norm=TwoSlopeNorm(1, low, high), aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(min(most, 17), integer=True))
    _tick_names(axes, "y", shorts, room=max(12, int(5 * height)))
    ticks = [*np.linspace(low, 1, 4), *np.linspace(1, high, 4)[1:]]
    bar = figure.colorbar(image, ax=panels, pad=0.02, fraction=0.03, extend="both", ticks=ticks, format="%.2f")
    bar.set_label("E softmax(alpha) beta; 1 = as pretrained")
    return figure


def _count_kept(bars: Axes, kept: list[int], counts: list[int], most: int) -> None:
    """Beside the heat map, in its rows: how many experts each layer keeps of how many."""
    places = range(len(kept))
    bars.barh(places, counts, color="0.88")
    bars.barh(places, kept, color="0.45")
    for place, count in zip(places, kept, strict=True):
        bars.text(count + 0.03 * most, place, str(count), va="center", fontsize=8)
    bars.set(title="kept per layer", xlabel="experts", xlim=(0, 1.3 * most))
    bars.tick_params(labelleft=False)
    bars.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _layer_colors(num_layers: int) -> Any:
    """A colour per layer, from blue to red with depth."""
    return colormaps["turbo"](np.linspace(0.05, 0.95, num_layers))


def _name_layers(figure: Figure, panels: list[Axes], names: list[str], colors: Any) -> None:
    label, shorts = _short_names(names)
    if len(names) <= MOST_IN_LEGEND:
        figure.legend(panels[1].get_lines(), shorts, title=label, loc="outside lower center", ncols=MOST_IN_LEGEND)
        return
    mapped = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(colors))
    bar = figure.colorbar(mapped, ax=panels, fraction=0.04, pad=0.02)
    _tick_names(bar.ax, "y", shorts, room=32)
    bar.ax.invert_yaxis()
    bar.ax.minorticks_off()
    bar.set_label(label)


def _tick_names(axes: Axes, axis: str, shorts: list[str], room: int) -> None:
    """Name all layers, or every second, third, ... where there is no room for all."""
    places = range(0, len(shorts), -(-len(shorts) // room))
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(list(places), [shorts[place] for place in places])


def _short_names(names: list[str]) -> tuple[str, list[str]]:
    """A label with what the names share, ``MoE layer (model.layers.*.mlp)``, and the rest of each name."""
    if len(names) == 1:
        return "MoE layer", names
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    head = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    rest = shortest - head - 1
    tail = next((i for i in range(rest) if len({part[-1 - i] for part in parts}) > 1), rest)
    shorts = [".".join(part[head : len(part) - tail]) for part in parts]
    shared = ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]])
    return "MoE layer" if shared == "*" else f"MoE layer ({shared})", shorts
