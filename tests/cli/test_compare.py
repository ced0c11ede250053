"""``compare``: every cell is what prune and evaluate give, nothing is done twice, and one failure costs one cell."""

from __future__ import annotations

import csv
import gc
import json
import statistics
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.cli import cells, methods
from lightning_moe.cli.grid import Cell
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method, get_method
from lightning_moe.criteria import criteria
from lightning_moe.files import write_json
from lightning_moe.modules import causal_lm
from lightning_moe.pruning.scores import ExpertScores, score_experts
from tests.helpers.checkpoint import Commands, Result, contents, damaged_copy, documents, read, write_text

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SMALL = ("--methods", "[reap,random]", "--ratios", "[0.5]", "--scopes", "[layer]", "--seeds", 2)
"""Three cells and the full model."""


@pytest.fixture(scope="session")
def val_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val_text")
    write_text(folder / "letters.txt", documents(20, start=500))
    write_text(folder / "tales.txt", documents(20, start=700))
    return folder


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


@pytest.fixture
def comparison(
    run: Commands, checkpoint: Path, text: Path, val_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Compare:
    return Compare(run, checkpoint, text, val_text, monkeypatch, tmp_path / "run")


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


def test_every_criterion_is_a_method() -> None:
    names = [method.name for method in methods.methods()]
    assert len(set(names)) == len(names)
    assert {criterion.name for criterion in criteria()} <= set(names)
    assert all(get_method(name).name == name for name in names)
    assert [name for name in names if get_method(name).seeded and name in {c.name for c in criteria()}] == ["random"]


def test_cells_are_what_prune_and_evaluate_give(
    comparison: Compare, run: Commands, text: Path, val_text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    grid = ("--methods", "[ean,random]", "--ratios", "[0.5]", "--scopes", "[layer,global]", "--seeds", 2)
    comparison.ok(*grid, "--seed_everything", 3)
    cells = comparison.cells()
    assert len(cells) == 1 + (1 + 2) * 2
    window = ("--data.seq_len", 32, "--data.samples")
    for number, ((method, scope, ratio, seed), row) in enumerate(cells.items()):
        out, model = tmp_path / str(number), checkpoint
        if method != "full":
            cut = ("--method", method, "--scope", scope, "--ratio", ratio, "--seed_everything", seed or 0)
            text_args = ("--data.path", text, *window, 12)
            run.ok("prune", *QUIET, "--model.path", checkpoint, *text_args, *cut, "--out", out)
            assert row["plan"] == read(out / "plan.json")["keep"]
            assert row["made_by"] == read(out / "plan.json")["made_by"]
            assert row["kept_experts"] == read(out / "prune.json")["kept_experts"]
            model = out / "model"
        run.ok("evaluate", *QUIET, "--model.path", model, "--data.path", val_text, *window, 8, "--out", out)
        found = read(out / "evaluate.json")
        assert row["domains"] == pytest.approx(found["domains"], rel=1e-6)
        for name in ("perplexity", "loss", "tokens", "parameters"):
            assert row[name] == pytest.approx(found[name], rel=1e-6)
        assert row["domain_mean"] == pytest.approx(statistics.fmean(found["domains"].values()), rel=1e-6)
        assert row["bytes"] == sum(t.nbytes for f in model.glob("*.safetensors") for t in load_file(f).values())
        assert row["tokens_per_second"] > 0
    assert {seed for method, *_, seed in cells if method == "random"} == {3, 4}
    assert read(comparison.out / "compare.json")["validation_fingerprint"] == found["data_fingerprint"]


def test_csv_json_and_files_agree(comparison: Compare) -> None:
    said = comparison.ok("--methods", "[reap,random]", "--ratios", "[0.5, 0.25, 0.5]", "--scopes", "[layer]")
    found = read(comparison.out / "compare.json")
    with (comparison.out / "compare.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(found["cells"]) == 1 + 2 * (1 + 3)
    for line, row in zip(lines, found["cells"], strict=True):
        for name in ("method", "strategy", "scope", "status"):
            assert line[name] == (row[name] or "")
        assert row["strategy"] == "one-shot"
        for name in (
            "ratio",
            "perplexity",
            "loss",
            "tokens",
            "tokens_per_second",
            "parameters",
            "bytes",
            "domain_mean",
        ):
            assert float(line[name]) == row[name]
        assert line["seed"] == ("" if row["seed"] is None else str(row["seed"]))
        assert {name: float(line[f"perplexity/{name}"]) for name in ("letters", "tales")} == row["domains"]
        assert json.loads(line["plan"]) == row["plan"]
        assert json.loads(line["kept_experts"]) == row["kept_experts"]
        file = next(
            file
            for file in (comparison.out / "cells").iterdir()
            if all(read(file)[name] == row[name] for name in ("method", "scope", "ratio", "seed"))
        )
        cell = {name: value for name, value in read(file).items() if name not in ("version", "request")}
        full = found["cells"][0]["perplexity"]
        gap = {} if row["method"] == "full" else {"gap": row["perplexity"] / full - 1}  # depends on another cell
        assert cell | gap == row
    assert len(list((comparison.out / "cells").iterdir())) == len(lines)
    assert found["request"] == read(file)["request"]
    assert not list(comparison.out.rglob("*partial*"))
    for name in ("full model", "reap", "random", "25%", "50%", "±", str(comparison.out)):
        assert name in said.out


def test_a_method_may_name_its_scope(comparison: Compare) -> None:
    """And has that one alone, each cell once; the others have all that were asked for."""
    comparison.ok("--methods", "[ean@global,reap,ean@global,reap@layer]", "--ratios", "[0.5]", "--scopes", "[layer]")
    assert [key[:2] for key in comparison.cells()] == [("full", None), ("ean", "global"), ("reap", "layer")]


def test_a_criterion_from_either_end(comparison: Compare, run: Commands, tmp_path: Path) -> None:
    """``ean-max`` is ``ean`` with ``--direction max``, to ``prune`` as well."""
    comparison.ok("--methods", "[ean,ean-min,ean-max]", "--ratios", "[0.5]", "--scopes", "[layer]")
    plans = {method: row["plan"] for (method, *_), row in comparison.cells().items()}
    assert plans["ean"] == plans["ean-min"] != plans["ean-max"]
    stats = ("--model.path", comparison.args[comparison.args.index("--model.path") + 1], "--stats", comparison.out)
    for name, asked in (("long", ("ean", "--direction", "max")), ("short", ("ean-max",))):
        run.ok("prune", *QUIET, *stats, "--method", *asked, "--out", tmp_path / name)
        plan = read(tmp_path / name / "plan.json")
        assert plan["keep"] == plans["ean-max"] and plan["made_by"]["direction"] == "max"
    methods_of = read(tmp_path / "short" / "scores.json")["methods"]
    assert methods_of["ean-max"]["direction"] == "max" and methods_of["ean"]["direction"] == "min"


def test_random_has_spread_criteria_have_none(comparison: Compare) -> None:
    comparison.ok("--methods", "[random,ean]", "--ratios", "[0.5]", "--scopes", "[layer]", "--seeds", 4)
    spread = {entry["method"]: entry for entry in read(comparison.out / "compare.json")["spread"]}
    values = [row["perplexity"] for (method, *_), row in comparison.cells().items() if method == "random"]
    found = spread["random"]["perplexity"]
    assert spread["random"]["cells"] == len(values) == 4
    assert len(set(values)) > 1
    assert (found["min"], found["max"]) == (min(values), max(values))
    assert found["mean"] == pytest.approx(sum(values) / 4)
    assert found["std"] == pytest.approx(float(torch.tensor(values, dtype=torch.float64).std()))
    assert spread["ean"]["cells"] == 1
    assert spread["ean"]["perplexity"]["std"] is None
    assert spread["ean"]["perplexity"]["min"] == spread["ean"]["perplexity"]["max"]


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


def test_measured_on_the_calibration_text_it_says_so(
    comparison: Compare, run: Commands, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert "note:" not in comparison.ok(*SMALL).out
    place = comparison.args.index("--data.val_path")
    del comparison.args[place : place + 2]
    comparison.out = tmp_path / "other"
    said = comparison.ok(*SMALL)
    assert "--data.val_path" in said.out
    window = ("--data.seq_len", 32, "--data.samples", 8)
    run.ok("evaluate", *QUIET, "--model.path", checkpoint, "--data.path", text, *window, "--out", tmp_path / "full")
    full = comparison.cells()["full", None, 0.0, None]
    assert full["perplexity"] == read(tmp_path / "full" / "evaluate.json")["perplexity"]


BAD = {
    "unknown method": (("--methods", "[ean,reap-summ]"), ["reap-summ", "'reap-sum'"]),
    "unknown own scope": (("--methods", "[ean@globl]"), ["--methods ean@globl", "globl", "'global'"]),
    "random from an end": (("--methods", "[random-max]"), ["'random-max'"]),
    "unknown scope": (("--scopes", "[globl]"), ["globl", "'global'"]),
    "no ratio": (("--ratios", "[]"), ["--ratios"]),
    "no fraction": (("--ratios", "[0.5,1.5]"), ["1.5", "between 0 and 1"]),
    "ratio in words": (("--ratios", "[half]"), ["--ratios", "half"]),
    "no list": (("--methods", "ean"), ["--methods", "'[ean]'"]),
    "no seeds": (("--seeds", 0), ["--seeds 0"]),
    "no windows": (("--data.val_samples", 0), ["--data.val_samples 0"]),
    "no such text": (("--data.val_path", "/nowhere"), ["/nowhere"]),
    "less text": (("--trainer.limit_val_batches", 1), ["--trainer.limit_val_batches"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(comparison: Compare, name: str) -> None:
    args, words = BAD[name]
    said = comparison(*args)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
    assert (comparison.measured, comparison.observed) == (0, 0)
    assert not comparison.out.exists()


def test_a_damaged_model_is_refused_and_writes_nothing(comparison: Compare, checkpoint: Path, tmp_path: Path) -> None:
    said = comparison("--model.path", damaged_copy(checkpoint, tmp_path / "damaged"))
    assert said.code == 2
    assert "not finite" in said.err
    assert not comparison.out.exists()


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
