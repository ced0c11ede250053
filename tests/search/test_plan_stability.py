"""PlanStability: overlap by hand, and a stop exactly when the same plan was found often enough, over a resume too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.errors import InputError
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.plan_stability import PlanStability, overlap
from tests.helpers.families import tiny_model
from tests.search.tiny_search import batches, fit, wrapped

PLANS: dict[str, dict[str, list[int]]] = {
    "A": {"x": [0, 1, 2], "y": [5]},
    "B": {"x": [0, 1], "y": [4, 5]},
    "C": {"x": [2, 3], "y": [6, 7]},
}


class Scripted(DiEPSearch):
    """Its plan after each update is written down: one letter each."""

    def __init__(self, script: str, **arguments: Any) -> None:
        cheap: dict[str, Any] = {"task": "none", "weight": 0.0, "updates": len(script)}
        super().__init__(wrapped(tiny_model("mixtral", num_hidden_layers=1)), **(cheap | arguments))
        self.script = script

    def kept_experts(self) -> dict[str, list[int]]:
        return PLANS[self.script[self.done - 1]]


def test_overlap_by_hand() -> None:
    """Of B's four, A has 0, 1 and 5; of A's four, B has the same three; C has none of either but 2."""
    assert overlap(PLANS["A"], PLANS["B"]) == overlap(PLANS["B"], PLANS["A"]) == 0.75
    assert overlap(PLANS["A"], PLANS["C"]) == 0.25
    assert overlap(PLANS["B"], PLANS["C"]) == 0
    assert overlap(PLANS["C"], PLANS["C"]) == 1
    assert overlap({"x": [0, 1, 2]}, {"x": [1]}) == 1  # a fraction of what is kept now


@pytest.mark.parametrize(
    ("script", "every", "patience", "stops", "overlaps"),
    [
        ("ABBCCCCCC", 1, 2, 6, [0.75, 1, 0, 1, 1]),
        ("ABBCCCCCC", 1, 1, 3, [0.75, 1]),
        ("ABBCCCCCC", 1, None, 9, [0.75, 1, 0, 1, 1, 1, 1, 1]),
        ("ABBCCCCCC", 1, 9, 9, [0.75, 1, 0, 1, 1, 1, 1, 1]),
        ("CACBCACBCB", 2, 1, 10, [0.75, 0.75, 0.75, 1]),  # A B A B B: every other one counts
        ("CACACACBCB", 2, 2, 6, [1, 1]),
        ("AAA", 4, 1, 3, []),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_stops_when_the_plan_stays(
    script: str, every: int, patience: int | None, stops: int, overlaps: Sequence[float], accumulate: int
) -> None:
    search, stability = Scripted(script, accumulate=accumulate), PlanStability(every, patience)
    trainer = fit(search, batches(1, rows=1, length=4), stability)
    assert search.done == stops
    assert stability.overlaps == overlaps
    if overlaps:
        assert float(trainer.callback_metrics["search/plan_overlap"]) == overlaps[-1]


@pytest.mark.parametrize("kept_until", [2, 3, 4, 5])
def test_its_memory_survives_a_resume(tmp_path: Path, kept_until: int) -> None:
    script, data = "ABBCCCCCC", batches(1, rows=1, length=4)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, monitor=None)
    fit(Scripted(script), data, PlanStability(1, 2), saves, enable_checkpointing=True)
    search, stability = Scripted(script), PlanStability(1, 2)
    fit(search, data, stability, ckpt_path=tmp_path / f"step={kept_until}.ckpt")
    assert search.done == 6
    assert stability.overlaps == [0.75, 1, 0, 1, 1]


def test_a_search_that_had_stopped_stays_stopped(tmp_path: Path) -> None:
    """Killed between its last save and its end, it must not go on: the same plan as unbroken."""
    script, data = "ABBCCCCCC", batches(1, rows=1, length=4)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, monitor=None)
    fit(Scripted(script), data, PlanStability(1, 2), saves, enable_checkpointing=True)
    search, stability = Scripted(script), PlanStability(1, 2)
    fit(search, data, stability, ckpt_path=tmp_path / "step=6.ckpt")
    assert search.done == 6
    assert stability.overlaps == [0.75, 1, 0, 1, 1]


@pytest.mark.parametrize(("bad", "said"), [({"every": 0}, "--check_every 0"), ({"patience": 0}, "--patience 0")])
def test_bad_arguments_are_refused(bad: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PlanStability(**bad)
