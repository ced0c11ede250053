"""``compare`` on the tiny checkpoint, with counts of what it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.cli import cells
from tests.helpers.checkpoint import Commands, Result, read
from tests.helpers.command_runs import QUIET

SMALL = ("--methods", "[reap,random]", "--ratios", "[0.5]", "--scopes", "[layer]", "--seeds", 2)
"""Three cells and the full model."""


class Compare:
    """Runs the command on the tiny checkpoint, and counts what it does."""

    def __init__(
        self, run: Commands, checkpoint: Path, text: Path, val_text: Path, patch: pytest.MonkeyPatch, out: Path
    ) -> None:
        self.run, self.out = run, out
        data = ("--data.path", text, "--data.val_path", val_text, "--data.seq_len", 32, "--data.samples", 12)
        self.args = [*QUIET, "--model.path", checkpoint, *data, "--data.val_samples", 8]
        self.measured = self.observed = 0
        self.before_measuring: Callable[[int], None] = lambda turn: None
        measure, batch = cells.measure, ExpertObservation._next_batch

        def counting_measure(*args: Any) -> dict[str, Any]:
            self.measured += 1
            self.before_measuring(self.measured)
            return measure(*args)

        def counting_batch(*args: Any) -> None:
            self.observed += 1
            batch(*args)

        patch.setattr(cells, "measure", counting_measure)
        patch.setattr(ExpertObservation, "_next_batch", counting_batch)

    def __call__(self, *args: object) -> Result:
        """As often as it is asked, counts begin at 0."""
        self.measured = self.observed = 0
        return self.run("compare", *self.args, *args, "--out", self.out)

    def ok(self, *args: object) -> Result:
        said = self(*args)
        assert said.code == 0, said.err
        return said

    def cells(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        found: list[dict[str, Any]] = read(self.out / "compare.json")["cells"]
        cells = {(row["method"], row["scope"], row["ratio"], row["seed"]): row for row in found}
        assert len(cells) == len(found)
        return cells
