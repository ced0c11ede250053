"""The side findings drawn: criteria against criteria, how often experts work, how alike they are."""

# A experts of all layers

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

MOST_LAYERS = 8
"""Layers whose experts are drawn against each other, spread over the depth."""


def findings_figure(found: Mapping[str, Any]) -> Figure:
    """Of what ``findings`` gives."""
    names = list(found["similarity"])
    places = sorted({round(place) for place in np.linspace(0, len(names) - 1, min(MOST_LAYERS, len(names)))})
    figure = Figure(figsize=(12, 11), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[2, 1])
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    left, right = upper.subplots(1, 2)
    criteria = list(found["rank_correlation"])
    matrix = [[_number(found["rank_correlation"][one][other]) for other in criteria] for one in criteria]
    _drawn(left, matrix, "rank correlation of criteria within a layer", "RdBu", -1, 1)
    left.set_xticks(range(len(criteria)), criteria, rotation=90)
    left.set_yticks(range(len(criteria)), criteria)
    shares = [found["frequency"][name] for name in names]
    width = max(map(len, shares))
    rows = [[*row, *[np.nan] * (width - len(row))] for row in shares]
    _drawn(right, rows, "share of the tokens that an expert gets", "viridis", 0, None)
    right.set(xlabel="expert", ylabel="MoE layer")
    lower.suptitle("CKA between the outputs of two experts of a layer")
    for axes, place in zip(np.atleast_1d(lower.subplots(1, len(places))), places, strict=True):
        pairs = [[_number(value) for value in row] for row in found["similarity"][names[place]]["pairs"]]
        _drawn(axes, pairs, f"layer {place}", "viridis", 0, 1)
    return figure


def inter_layer_figure(found: Mapping[str, Any], cka_AA: Tensor) -> Figure:
    """Of what ``inter_layer`` gives, and of what it was given: each two layers, and every two experts."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = [[_number(value) for value in row] for row in found["layers"].values()]
    _drawn(left, means, "CKA between the outputs of experts of two layers, mean over pairs", "viridis", 0, None)
    left.set(xlabel="MoE layer", ylabel="MoE layer")
    title = f"CKA of every two experts, layer after layer, on {found['tokens']} tokens"
    _drawn(right, cka_AA.numpy(), title, "viridis", 0, 1)
    return figure


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _drawn(axes: Axes, matrix: Any, title: str, colours: str, least: float, most: float | None) -> None:
    image = axes.imshow(np.array(matrix, dtype=float), cmap=colours, vmin=least, vmax=most)
    axes.set_title(title, fontsize=9)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, shrink=0.7)
