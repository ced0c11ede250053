"""Cells of ``compare`` that are finished are not computed again, and one failure costs one cell."""

from __future__ import annotations

import csv
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_moe.cli import cells, methods
from lightning_moe.cli.grid import Cell
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method, get_method
from lightning_moe.files import write_json
from lightning_moe.modules import causal_lm
from lightning_moe.pruning.scores import ExpertScores, score_experts
from tests.helpers.checkpoint import Commands, contents, read
from tests.helpers.comparisons import SMALL, Compare


@pytest.fixture
def add_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Adds methods beside the criteria, as a search will be."""
    added: list[Method] = []
    stock = methods.methods
    monkeypatch.setattr(methods, "methods", lambda: [*stock(), *added])

    def add(name: str, scores: Any, **settings: bool) -> None:
        added.append(Method(name, "For a test.", scores, **settings))

    yield add


def plain(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
    return score_experts(job.stats, "random", seed=seed)


def test_one_pass_one_run_of_each_method_no_cell_twice(comparison: Compare, add_method: Callable[..., None]) -> None:
    calls: list[tuple[str, float | None, int]] = []

    def counted(name: str) -> Any:
        def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
            calls.append((name, ratio, seed))
            return plain(job, ratio, seed, folder)

        return scores

    add_method("search", counted("search"), seeded=True)
    add_method("cutwise", counted("cutwise"), per_ratio=True)
    grid = ("--methods", "[search,cutwise]", "--ratios", "[0.25,0.5]", "--scopes", "[layer,global]")
    comparison.ok(*grid, "--seeds", 2)
    expected = [("search", None, 0), ("search", None, 1), ("cutwise", 0.25, 0), ("cutwise", 0.5, 0)]
    assert sorted(map(str, calls)) == sorted(map(str, expected))
    assert comparison.measured == 1 + (2 + 1) * 4
    assert comparison.observed == 2  # 12 windows in batches of 8
    before = contents(comparison.out / "cells")

    said = comparison.ok(*grid, "--seeds", 2)
    assert (comparison.measured, comparison.observed, len(calls)) == (0, 0, 4)
    assert contents(comparison.out / "cells") == before
    assert "0 cells computed now, 13 earlier, 0 failed" in said.out

    comparison.ok(*grid, "--seeds", 3)  # more cells in the same folder: only these are new
    assert (comparison.measured, comparison.observed, len(calls)) == (4, 0, 5)
    comparison.ok(*grid, "--seeds", 3, "--overwrite", "true")
    assert comparison.measured == 1 + 16
    assert len(calls) == 10


def test_the_pass_of_score_is_reused(comparison: Compare, run: Commands) -> None:
    run.ok("score", *comparison.args, "--out", comparison.out)
    comparison.ok(*SMALL)
    assert comparison.observed == 0
    assert read(comparison.out / "compare.json")["observation_seconds"] is None


@pytest.mark.parametrize(("turn", "overwrite"), [(1, True), (2, True), (2, False), (4, False)])
def test_a_killed_run_goes_on(comparison: Compare, turn: int, overwrite: bool) -> None:
    again = ("--overwrite", "true") if overwrite else ()
    if overwrite:
        comparison.ok(*SMALL)
        for file in (comparison.out / "scores").iterdir():
            write_json(file, read(file) | {"seconds": -1.0})
    stop = comparison.before_measuring

    def kill(at: int) -> None:
        if at == turn:
            raise SystemExit(137)

    comparison.before_measuring = kill
    assert comparison(*SMALL, *again).code == 137
    comparison.before_measuring = stop
    comparison.ok(*SMALL, *again)
    # Killed before the full model was measured, a command that overwrites has not touched what was there.
    assert comparison.measured == 4 - (turn - 1)
    assert comparison.observed == 0  # the statistics are those of this model and text, whoever asked for them
    assert all(read(file)["seconds"] >= 0 for file in (comparison.out / "scores").iterdir())  # of none before
    assert [row["status"] for row in comparison.cells().values()] == ["done"] * 4


def test_a_killed_method_gets_its_own_folder_again(comparison: Compare, add_method: Callable[..., None]) -> None:
    seen: list[tuple[Path, bool]] = []

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        seen.append((folder, (folder / "half").exists()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half").touch()
        if len(seen) == 1:
            raise SystemExit(137)
        return plain(job, ratio, seed, folder)

    add_method("search", scores, seeded=True)
    grid = ("--methods", "[search]", "--ratios", "[0.5]", "--scopes", "[layer]", "--seeds", 2)
    assert comparison(*grid).code == 137
    comparison.ok(*grid)
    (first, had), (again, has), (other, fresh) = seen
    assert first == again != other
    assert (had, has, fresh) == (False, True, False)
    assert not first.exists() and not other.exists()


def test_one_failing_method_leaves_the_others_and_is_tried_again(
    comparison: Compare, add_method: Callable[..., None]
) -> None:
    calls: list[int] = []

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        calls.append(seed)
        if len(calls) == 1:
            raise RuntimeError("the device is\non fire")
        return plain(job, ratio, seed, folder)

    add_method("search", scores)
    grid = ("--methods", "[search,reap]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]")
    said = comparison(*grid)
    assert said.code == 1
    assert "2 of 5 cells failed" in said.err.splitlines()[-1]
    assert "failed" in said.out
    assert calls == [0]  # not tried for every ratio
    rows = comparison.cells()
    for ratio in (0.25, 0.5):
        failed = rows["search", "layer", ratio, None]
        assert failed["status"] == "failed"
        assert failed["reason"] == "RuntimeError: the device is"
        assert rows["reap", "layer", ratio, None]["status"] == "done"
    with (comparison.out / "compare.csv").open(newline="") as stream:
        assert [line["status"] for line in csv.DictReader(stream)] == ["done", "failed", "failed", "done", "done"]
    spread = {(entry["method"], entry["ratio"]): entry for entry in read(comparison.out / "compare.json")["spread"]}
    assert spread["search", 0.5]["failed"] == 1
    assert spread["search", 0.5]["perplexity"]["mean"] is None

    comparison.ok(*grid)
    assert comparison.measured == 2
    assert calls == [0, 0]
    assert all(row["status"] == "done" for row in comparison.cells().values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_one_rank_alone_may_suffer_ends_the_job_of_several(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it within the cell."""
    comparison = object.__new__(cells.Comparison)
    comparison.trainer = SimpleNamespace(world_size=ranks)  # type: ignore[assignment]
    comparison._cells = SimpleNamespace(put=lambda name, row: row)  # type: ignore[assignment]
    monkeypatch.setattr(comparison, "_measured", lambda cell: (_ for _ in ()).throw(OSError("disk full")))
    cell = Cell(get_method("ean"), "layer", 0.5, None)
    if ranks == 1:
        assert comparison._computed(cell)["reason"] == "OSError: disk full"
    else:
        with pytest.raises(OSError, match="disk full"):
            comparison._computed(cell)


def test_a_ratio_that_cannot_be_is_one_failed_cell(comparison: Compare) -> None:
    """Of 8 experts with top-2, a layer can lose 6; all layers together 12 of 16."""
    said = comparison("--methods", "[reap]", "--ratios", "[0.8,0.5]", "--scopes", "[layer,global]")
    assert said.code == 1
    rows = comparison.cells()
    assert rows["reap", "global", 0.8, None]["status"] == "failed"
    assert "possible ratios" in rows["reap", "global", 0.8, None]["reason"]
    assert rows["reap", "global", 0.5, None]["status"] == "done"


def test_a_spoilt_cell_is_computed_again(comparison: Compare) -> None:
    comparison.ok(*SMALL)
    file = next((comparison.out / "cells").glob("reap-*.json"))
    good = read(file)
    other = good | {"request": good["request"] | {"data.samples": 999}, "perplexity": 1.0}
    for content in ("", "{", "[]", '{"status": "done"}', "\xff", json.dumps(other)):
        file.write_text(content, encoding="latin-1")
        comparison.ok(*SMALL)
        assert comparison.measured == 1
        again = read(file)
        assert (again["plan"], again["perplexity"]) == (good["plan"], good["perplexity"])


def test_another_request_is_refused(comparison: Compare) -> None:
    def kill(at: int) -> None:
        if at == 2:
            raise SystemExit(137)

    comparison.before_measuring = kill
    comparison(*SMALL)
    before = contents(comparison.out)
    said = comparison(*SMALL, "--data.val_samples", 5)
    assert said.code == 2
    assert "data.val_samples" in said.err and len(said.err.splitlines()) == 1
    assert contents(comparison.out) == before


def test_never_two_models_at_a_time(comparison: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    load_model = causal_lm.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert all(model() is None for model in loaded), "an earlier model is still held"
        model = load_model(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(causal_lm, "load_model", watched)
    gc.disable()
    try:
        comparison.ok(*SMALL)
    finally:
        gc.enable()
    assert len(loaded) == 3  # the full model serves itself, the pass and the first cell
