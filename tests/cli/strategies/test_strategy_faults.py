"""Strategies of ``compare`` that are killed go on, and one that fails leaves the others as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.cli import rounds
from lightning_moe.search.diep import DiEPSearch
from tests.cli.strategies.grid_runs import LOTTERY, Strategies, cells_in, lasting


@pytest.mark.parametrize(
    ("kill_at", "save_seconds", "lost"), [(1, 300.0, 0), (2, 0.0, 0), (3, 0.0, 0), (3, 300.0, 1), (6, 0.0, 0)]
)
def test_killed_while_tuning_it_goes_on(
    strategies: Strategies,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    save_seconds: float,
    lost: int,
) -> None:
    """Steps 1, then 2 and 3, are of the rounds of the lottery; 4, then 5 and 6, of the full model."""
    monkeypatch.setattr(rounds, "SAVE_SECONDS", save_seconds)
    go_on = strategies.before_step

    def kill(turn: int) -> None:
        if turn == kill_at:
            raise SystemExit(137)

    strategies.before_step = kill
    killed = strategies(*LOTTERY)
    assert killed.code == 137 and "goes on" in killed.err
    assert (strategies.out / ".partial").is_dir()
    strategies.before_step = go_on
    strategies.ok(*LOTTERY)
    assert strategies.counts["steps"] == 6 - (kill_at - 1) + lost
    whole = cells_in(finished)
    assert lasting(strategies.cells()) == lasting({key: whole[key] for key in strategies.cells()})
    assert len(strategies.cells()) == 1 + 2 + 2
    assert not (strategies.out / ".partial").exists()


def test_a_run_of_rounds_that_fails_fails_once(strategies: Strategies, finished: Path) -> None:
    def fail(turn: int) -> None:
        if turn == 2:
            raise RuntimeError("the device is\non fire")

    go_on, strategies.before_step = strategies.before_step, fail
    said = strategies(*LOTTERY, "--strategies", "[one-shot,lottery]")
    assert said.code == 1 and "2 of 7 cells failed" in said.err.splitlines()[-1]
    assert strategies.counts["steps"] == 2 + 3  # not tried for every ratio; the full model is tuned all the same
    cells, whole = strategies.cells(), cells_in(finished)
    for ratio in (0.25, 0.5):
        assert "RuntimeError: the device is" in cells["reap", "lottery", ratio, 3]["reason"]
    done = {key: row for key, row in cells.items() if row["status"] == "done"}
    assert len(done) == 5
    assert lasting(done) == lasting({key: whole[key] for key in done})
    strategies.before_step = go_on
    strategies.ok(*LOTTERY, "--strategies", "[one-shot,lottery]")
    assert strategies.counts["steps"] == 2  # the first round is there already
    assert lasting(strategies.cells()) == lasting({key: whole[key] for key in cells})


@pytest.mark.parametrize("how", ["raises", "diverges"])
def test_a_search_that_fails_leaves_a_model_to_tune(
    strategies: Strategies, finished: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It froze the weights and left training mode; the next method gets the same model, and tunes it as ever."""

    def fail(search: DiEPSearch, *args: Any) -> None:
        if how == "raises":
            raise RuntimeError("out of memory")
        with torch.no_grad():
            search.importance.beta_L.fill_(torch.inf)

    monkeypatch.setattr(DiEPSearch, "training_step" if how == "raises" else "_update", fail)
    said = strategies(*LOTTERY, "--methods", "[diep,reap]")
    assert said.code == 1 and "2 of 7 cells failed" in said.err.splitlines()[-1]
    cells, whole = strategies.cells(), cells_in(finished)
    for ratio in (0.25, 0.5):
        reason = cells["diep", "lottery", ratio, 3]["reason"]
        assert ("out of memory" if how == "raises" else "no longer finite") in reason
    done = {key: row for key, row in cells.items() if row["status"] == "done"}
    assert len(done) == 5
    assert lasting(done) == lasting({key: whole[key] for key in done})
    assert strategies.counts["loaded"] == 2  # the first served the search, too
