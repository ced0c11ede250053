"""ImportanceCurve and its panels: what is kept of a search, and how it is drawn."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.callbacks.importance_curve import MOST_SNAPSHOTS, ImportanceCurve
from lightning_moe.callbacks.importance_panels import _short_names, experts
from tests.callbacks.importance_fit import (
    assert_same,
)


def test_a_step_back_forgets_what_came_after() -> None:
    curve = ImportanceCurve(1)
    for step in (0, 1, 2, 3, 1):
        curve.add(step, {"moe": (torch.full((2,), float(step)), torch.tensor(10.0 * step))})
    assert curve.steps == [0, 1]
    assert curve.alpha_SE("moe").tolist() == [[0, 0], [1, 1]]
    assert curve.betas["moe"] == [0, 10]


def test_memory_is_bounded() -> None:
    """However long the search: at most so many snapshots, evenly spaced from the first on, the newest among them."""
    curve = ImportanceCurve(1)
    for step in range(2000):
        if curve.is_due(step):
            curve.add(step, {"moe": (torch.full((2,), float(step)), torch.tensor(1.0))})
            assert len(curve.steps) <= MOST_SNAPSHOTS
            assert curve.steps[-1] == step
    assert len(curve.steps) >= MOST_SNAPSHOTS // 2
    assert curve.steps == list(range(0, 2000, 8))
    assert curve.alpha_SE("moe")[:, 0].tolist() == curve.steps
    again = ImportanceCurve(1)
    again.load_state_dict(curve.state_dict())
    assert_same(again, curve)
    assert again.spacing == curve.spacing == 8


def test_snapshots_are_copies() -> None:
    """Optimisers write in place."""
    alpha, beta = torch.zeros(2), torch.ones(())
    curve = ImportanceCurve(1)
    curve.add(0, {"moe": (alpha, beta)})
    alpha += 1
    assert curve.alpha_SE("moe").tolist() == [[0, 0]]


def test_marks_lie_on_the_kept() -> None:
    gates = {"a.0.moe": torch.ones(3), "a.1.moe": torch.tensor([2.0, 0.5])}
    figure = experts(gates, {"a.0.moe": [2], "a.1.moe": [0, 1]})
    heat, bars, *_ = figure.axes
    assert heat.get_title() == "importance of 5 experts; a dot marks the 3 kept (60.0%)"
    assert heat.collections[0].get_offsets().tolist() == [[2, 0], [0, 1], [1, 1]]  # type: ignore[union-attr]
    assert [text.get_text() for text in bars.texts] == ["1", "2"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.layers.3.mlp", "m.layers.11.mlp"], ("MoE layer (m.layers.*.mlp)", ["3", "11"])),
        (["first", "second"], ("MoE layer", ["first", "second"])),
        (["m.mlp"], ("MoE layer", ["m.mlp"])),
        (["m.0", "m.0.moe"], ("MoE layer (m.*)", ["0", "0.moe"])),
        (["a.x.mlp", "b.y.z.mlp"], ("MoE layer (*.mlp)", ["a.x", "b.y.z"])),
    ],
)
def test_short_names(names: list[str], expected: tuple[str, list[str]]) -> None:
    assert _short_names(names) == expected
