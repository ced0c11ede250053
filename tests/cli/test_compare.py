"""``compare``: every cell is what prune and evaluate give, its files agree, and bad input is refused."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_moe.cli import methods
from lightning_moe.cli.methods import get_method
from lightning_moe.criteria import criteria
from tests.helpers.checkpoint import Commands, damaged_copy, read
from tests.helpers.command_runs import QUIET
from tests.helpers.comparisons import SMALL, Compare


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
