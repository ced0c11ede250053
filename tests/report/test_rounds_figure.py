"""The figure of a run of rounds holds every number that was measured, in the order of time."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from lightning_moe.pruning.round_record import MOMENTS, RoundRecord
from lightning_moe.report.rounds_figure import NAMES, rounds_figure


def record(turn: int, values: list[float]) -> RoundRecord:
    """A round with these perplexities at its first moments, and a tenth of each as skew of the load."""
    measured = dict(zip(MOMENTS, values, strict=False))
    return RoundRecord(
        turn,
        0.25 * turn,
        "reap",
        {},
        {},
        {},
        perplexity={moment: {"all": value} for moment, value in measured.items()},
        load={moment: {"mean": {"cv": value / 10}} for moment, value in measured.items()},
    )


def points(axes: Axes) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines}


@pytest.mark.parametrize(("panel", "scale"), [(0, 1.0), (1, 0.1)])
def test_a_saw_tooth_a_round(panel: int, scale: float) -> None:
    """Times grow from left to right, within a round and from one to the next."""
    values = [[10.0, 30.0, 12.0], [12.0, 50.0, 20.0]]
    figure = rounds_figure([record(turn, row) for turn, row in enumerate(values, start=1)])
    found = points(figure.axes[panel])
    for place, moment in enumerate(MOMENTS):
        assert [y for _, y in found[NAMES[moment]]] == pytest.approx([row[place] * scale for row in values])
    (line,) = (xy for name, xy in found.items() if name not in NAMES.values())
    assert [y for _, y in line] == pytest.approx([y * scale for row in values for y in row])
    times = [x for x, _ in line]
    assert times == sorted(set(times))
    assert [round(x) for x in times] == [1, 1, 1, 2, 2, 2]


def test_rounds_are_named_by_what_is_gone() -> None:
    axes = rounds_figure([record(1, [1.0, 2.0]), record(2, [2.0, 3.0])]).axes[1]
    assert list(axes.get_xticks()) == [1, 2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n25%", "2\n50%"]


def test_a_moment_that_nobody_measured_has_no_points(tmp_path: Path) -> None:
    """Rounds without tuning; and tuning in one round alone, as when its tokens come to nothing."""
    figure = rounds_figure([record(1, [10.0, 30.0])])
    assert NAMES["after_finetune"] not in points(figure.axes[0])
    figure = rounds_figure([record(1, [10.0, 30.0, 12.0]), record(2, [12.0, 40.0])])
    assert [y for _, y in points(figure.axes[0])[NAMES["after_finetune"]]] == [12.0]
    figure.savefig(tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").stat().st_size > 1000
