"""Grids of strategies that ``compare`` fills: how they are asked for, their cells, and the work that a run took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_moe.cli import cells, rounds
from lightning_moe.modules import causal_lm
from lightning_moe.modules.causal_lm import MoECausalLM
from tests.helpers.checkpoint import Commands, Result, read

STRATEGIES = ("one-shot", "iterative", "lottery", "one-shot-tuned")
GRID = ("--methods", "[reap,random]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]")
TUNING = ("--finetune_tokens", 128)
"""One step after the first round of the lottery, two after the second."""
ALL = (*GRID, "--strategies", f"[{','.join(STRATEGIES)}]", "--seeds", 2, *TUNING)
LOTTERY = ("--methods", "[reap]", *GRID[2:], "--strategies", "[lottery]", "--seeds", 1, *TUNING)
UNTUNED = ("--methods", "[reap]", *GRID[2:], "--strategies", "[one-shot,iterative]", "--seeds", 1)

TIMES = ("tokens_per_second", "method_seconds")


def on(checkpoint: Path, text: Path, val_text: Path) -> list[str]:
    """Model and text, in batches of four windows."""
    args = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.path", checkpoint]
    args += ["--data.path", text, "--data.val_path", val_text, "--data.seq_len", 32, "--data.batch_size", 4]
    return [*map(str, args), "--data.samples", "8", "--data.val_samples", "4", "--seed_everything", "3"]


Cells = dict[tuple[Any, ...], dict[str, Any]]


def cells_in(out: Path) -> Cells:
    """By method, strategy, ratio and seed."""
    found: list[dict[str, Any]] = read(out / "compare.json")["cells"]
    cells = {(row["method"], row["strategy"], row["ratio"], row["seed"]): row for row in found}
    assert len(cells) == len(found)
    return cells


def lasting(cells: Cells) -> Cells:
    """Without what another run of the same measures anew: time."""
    return {key: {name: row[name] for name in row.keys() - {*TIMES}} for key, row in cells.items()}


class Strategies:
    """Runs the command on the tiny checkpoint, and counts what it does."""

    def __init__(self, run: Commands, args: list[str], patch: pytest.MonkeyPatch, out: Path) -> None:
        self.run, self.args, self.out = run, args, out
        self.counts = {"measured": 0, "tuned": 0, "observed": 0, "steps": 0, "loaded": 0}
        self.before_step: Callable[[int], None] = lambda turn: None
        self._count(patch, "measured", (cells, "measure"), (rounds, "measure"))
        self._count(patch, "tuned", (rounds, "tune"))
        self._count(patch, "observed", (cells, "observe"), (rounds, "observe_into"))
        self._count(patch, "loaded", (causal_lm, "load_model"))
        step = MoECausalLM.training_step

        def counting_step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.counts["steps"] += 1
            self.before_step(self.counts["steps"])
            return step(module, batch, batch_idx)

        patch.setattr(MoECausalLM, "training_step", counting_step)

    def _count(self, patch: pytest.MonkeyPatch, name: str, *places: tuple[Any, str]) -> None:
        def counting(stock: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                self.counts[name] += 1
                return stock(*args, **kwargs)

            return counted

        for module, function in places:
            patch.setattr(module, function, counting(getattr(module, function)))

    def __call__(self, *args: object, command: str = "compare") -> Result:
        """As often as it is asked, counts begin at 0."""
        self.counts = dict.fromkeys(self.counts, 0)
        return self.run(command, *self.args, *args, "--out", self.out)

    def ok(self, *args: object) -> Result:
        said = self(*args)
        assert said.code == 0, said.err
        return said

    def cells(self) -> Cells:
        return cells_in(self.out)
