"""Strategies of ``compare``: one run of rounds serves all ratios, and nothing is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_moe.cli import methods
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method
from lightning_moe.pruning.scores import ExpertScores, score_experts
from tests.cli.strategies.grid_runs import ALL, GRID, LOTTERY, STRATEGIES, UNTUNED, Strategies, cells_in, lasting
from tests.helpers.checkpoint import contents, read


def test_one_run_of_rounds_serves_all_ratios(strategies: Strategies) -> None:
    """Measured are the full model; both cuts; both rounds; both rounds twice, before and after tuning; both cuts that
    are tuned, likewise; the full model tuned, twice. Experts are observed once, and in each second round."""
    said = strategies.ok(*ALL[:1], "[reap]", *ALL[2:], "--seeds", 1)
    assert strategies.counts["measured"] == 1 + 2 + 2 + 4 + 4 + 2
    assert (strategies.counts["tuned"], strategies.counts["steps"]) == (2 + 2 + 2, 3 + (1 + 3) + 3)
    assert strategies.counts["observed"] == 1 + 1 + 1
    assert "11 cells computed now, 0 earlier, 0 failed" in said.out
    for title in ("full model", "tuned", *STRATEGIES):
        assert title in said.out


def test_asked_again_nothing_is_computed(again: Strategies, finished: Path) -> None:
    before, found = contents(again.out / "cells") | contents(again.out / "rounds"), cells_in(finished)
    said = again.ok(*ALL)
    assert "0 cells computed now, 33 earlier, 0 failed" in said.out
    assert set(again.counts.values()) == {0}
    assert contents(again.out / "cells") | contents(again.out / "rounds") == before
    assert again.cells() == found


@pytest.mark.parametrize(
    "change",
    [("--finetune_lr", 1e-3), ("--finetune_tokens", 256), ("--finetune_growth", 1), ("--recovery.load_balance", 0.5)],
)
def test_other_tuning_is_computed_where_there_is_some(
    again: Strategies, finished: Path, change: tuple[object, ...]
) -> None:
    again.ok(*LOTTERY, "--strategies", "[one-shot,iterative,lottery]", *change)
    before, after = cells_in(finished), again.cells()
    assert len(after) == 1 + 2 + 2 + 2 + 2
    for (method, strategy, ratio, seed), row in after.items():
        same = row == before[method, strategy, ratio, seed]
        same_first = change[0] == "--finetune_growth" and ratio == 0.25  # nothing has grown in the first round
        assert same == (strategy not in ("lottery", "tuned"))
        if not same_first:
            assert same == (row["perplexity"] == before[method, strategy, ratio, seed]["perplexity"])
    assert again.counts["tuned"] == 4
    again.ok(*LOTTERY)  # as it was: those runs are still known
    assert (again.counts["tuned"], again.counts["measured"]) == (0, 0)
    assert all(row == before[key] for key, row in again.cells().items())


def test_other_rounds_are_computed_where_there_are_some(again: Strategies, finished: Path) -> None:
    again.ok(*UNTUNED, "--rounds", "[0.125,0.25,0.375,0.5]")
    before, after = cells_in(finished), again.cells()
    assert again.counts["measured"] == 4
    assert [after["reap", "iterative", ratio, None]["rounds"] for ratio in (0.25, 0.5)] == [2, 4]
    assert all(
        after["reap", "one-shot", ratio, None] == before["reap", "one-shot", ratio, None] for ratio in (0.25, 0.5)
    )
    again.ok(*UNTUNED, "--rounds", 4)  # the same by another name
    assert (again.counts["measured"], again.cells()) == (0, after)


@pytest.mark.parametrize("name", [("--rounds", 2), ("--rounds", "[0.25,0.5]"), ("--spacing", "cosine")])
def test_the_same_rounds_by_another_name_are_known(again: Strategies, finished: Path, name: tuple[object, ...]) -> None:
    """Two rounds of a cosine are equal ones."""
    said = again.ok(*ALL, *name)
    assert "0 cells computed now, 33 earlier, 0 failed" in said.out
    assert set(again.counts.values()) == {0}
    assert again.cells() == cells_in(finished)


def test_a_method_for_each_ratio_works_for_the_rounds(strategies: Strategies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round asks it for the share that is gone after that round, and says of what."""
    asked: list[tuple[float | None, list[int] | None]] = []

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        asked.append((ratio, None if job.whole is None else [shape.num_experts for shape in job.whole]))
        return score_experts(job.stats, "reap")

    stock = methods.methods
    added = Method("cutwise", "For a test.", scores, per_ratio=True)
    monkeypatch.setattr(methods, "methods", lambda: [*stock(), added])
    strategies.ok("--methods", "[cutwise]", *GRID[2:], "--strategies", "[iterative]")
    assert asked == [(0.25, None), (0.5, [8, 8])]  # the first is of the whole model itself


def test_cells_of_a_version_without_strategies_do_no_harm(again: Strategies, finished: Path) -> None:
    """They knew neither strategy nor load; in such a folder the same command gives what it gives in a new one."""
    for file in (again.out / "cells").iterdir():
        row = read(file)
        if row["strategy"] != "one-shot":
            file.unlink()
        else:
            kept = {name: row[name] for name in row.keys() - {"strategy", "load", "load_cv"}}
            file.write_text(json.dumps(kept | {"version": 1}))
    shutil.rmtree(again.out / "rounds")
    again.ok(*UNTUNED)
    whole = cells_in(finished)
    assert lasting(again.cells()) == lasting({key: whole[key] for key in again.cells()})
