"""``scan``: what ``evaluate`` gives of the model without an expert; after kills, and as a method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.cli.main import main
from lightning_moe.search.expert_scan import ExpertScan
from tests.helpers.checkpoint import Commands, damaged_copy, read, save_checkpoint

QUIET = ("--trainer.enable_progress_bar", "false")
CPU = ("--trainer.accelerator", "cpu")
LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]


def on(checkpoint: Path, text: Path) -> list[object]:
    """Five windows, two at a time: the last batch is smaller."""
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 5, "--data.batch_size", 2]
    return [*QUIET, "--model.path", checkpoint, *data]


@pytest.fixture(scope="module")
def finished(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan; to be read."""
    folder = tmp_path_factory.mktemp("scan")
    main([*map(str, ["scan", *on(checkpoint, text), *CPU, "--out", folder])])
    return folder


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each batch that is scanned."""
    seen: list[int] = []
    stock = ExpertScan.add

    def add(scan: ExpertScan, batch: Any) -> None:
        stock(scan, batch)
        seen.append(len(batch["input_ids"]))

    monkeypatch.setattr(ExpertScan, "add", add)
    return seen


def test_figures_are_those_of_evaluate(
    run: Commands, checkpoint: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    """Of the whole model, and of one that was pruned by a single expert."""
    found = read(finished / "scan.json")
    run.ok("evaluate", *on(checkpoint, text), *CPU, "--out", tmp_path)
    whole = read(tmp_path / "evaluate.json")
    for name in ("perplexity", "loss", "tokens", "model_id", "data_fingerprint"):
        assert found[name] == pytest.approx(whole[name], rel=1e-6) if name[0] in "plt" else found[name] == whole[name]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"keep": {LAYERS[1]: [0, 1, 2, 4, 5, 6, 7]}}))
    run.ok("prune", *QUIET, *CPU, "--model.path", checkpoint, "--plan", plan, "--out", tmp_path / "cut")
    run.ok("evaluate", *on(tmp_path / "cut" / "model", text), *CPU, "--out", tmp_path / "cut")
    without = read(tmp_path / "cut" / "evaluate.json")
    row = found["layers"][LAYERS[1]]
    assert row["perplexity"][3] == pytest.approx(without["perplexity"], rel=1e-6)
    assert row["difference"][3] == pytest.approx(without["perplexity"] - whole["perplexity"], abs=1e-3)
    rise = read(finished / "scores.json")["methods"]["scan"]["scores"][LAYERS[1]][3]
    assert rise == pytest.approx(without["loss"] - whole["loss"], abs=1e-5)
    assert found["experts"] == 16 and 0 < found["work"] <= 0.75


def test_what_it_writes_and_says(run: Commands, checkpoint: Path, text: Path, finished: Path, added: list[int]) -> None:
    """Asked again it says the same, and works no more."""
    said = run.ok("scan", *on(checkpoint, text), *CPU, "--out", finished)
    assert not added and "carried out here before" in said.out
    assert (finished / "figures" / "scan.png").is_file()
    assert read(finished / "summary.json") == read(finished / "scan.json")
    changes = [
        (change, name, expert)
        for name, row in read(finished / "scan.json")["layers"].items()
        for expert, change in enumerate(row["difference"])
    ]
    lines = [line for line in said.out.splitlines() if LAYERS[0] in line or LAYERS[1] in line]
    assert len(lines) == 10
    assert "least" in lines[0] and min(changes)[1] in lines[0] and f" {min(changes)[2]} " in lines[0]
    assert "most" in lines[5] and max(changes)[1] in lines[5] and f" {max(changes)[2]} " in lines[5]


def test_prune_by_its_scores_and_by_its_name(
    run: Commands, checkpoint: Path, text: Path, finished: Path, tmp_path: Path
) -> None:
    cut = ["--scope", "global", "--ratio", 0.25]
    run.ok(
        "prune", *QUIET, *CPU, "--model.path", checkpoint, "--scores", finished, *cut, "--out", tmp_path / "by scores"
    )
    run.ok("prune", *on(checkpoint, text), *CPU, "--method", "scan", *cut, "--out", tmp_path / "by name")
    changes = [
        (change, name, expert)
        for name, row in read(finished / "scan.json")["layers"].items()
        for expert, change in enumerate(row["difference"])
    ]
    gone = {(name, expert) for _, name, expert in sorted(changes)[:4]}
    keep = {name: [expert for expert in range(8) if (name, expert) not in gone] for name in LAYERS}
    for source in ("by scores", "by name"):
        plan = read(tmp_path / source / "plan.json")
        assert plan["keep"] == keep and plan["made_by"]["method"] == "scan"


def test_killed_it_goes_on_from_the_last_batch(
    run: Commands,
    checkpoint: Path,
    text: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    added: list[int],
) -> None:
    """In the midst of the third, and again when all are done; it ends with what was never killed."""
    args = ["scan", *on(checkpoint, text), *CPU, "--out", tmp_path]
    for where, done in (("add", 2), ("result", 3)):
        with monkeypatch.context() as patch:
            stock = getattr(ExpertScan, where)

            def killed(scan: ExpertScan, *more: Any, stock: Any = stock, done: int = done) -> None:
                if len(added) == done:
                    raise SystemExit(137)
                stock(scan, *more)

            patch.setattr(ExpertScan, where, killed)
            stopped = run(*args)
        assert stopped.code == 137 and "goes on from the last save" in stopped.err
        assert len(added) == done and not (tmp_path / "scan.json").exists()
    assert "Going on from batch 3" in run.ok(*args).out and len(added) == 3
    for name in ("perplexity", "tokens", "work", "layers"):
        assert read(tmp_path / "scan.json")[name] == read(finished / "scan.json")[name]
    assert not (tmp_path / ".partial").exists()


def test_bad_input_is_refused(run: Commands, checkpoint: Path, text: Path, tmp_path: Path, added: list[int]) -> None:
    two = save_checkpoint(tmp_path / "two", num_local_experts=2)
    refusals = {
        "none can be removed": on(two, text),
        "--data.samples": [*on(checkpoint, text), "--trainer.limit_predict_batches", 1],
        "damaged": on(damaged_copy(checkpoint, tmp_path / "damaged"), text),
    }
    for words, args in refusals.items():
        refused = run("scan", *args, *CPU, "--out", tmp_path / "run")
        assert refused.code == 2 and refused.err.count("\n") == 1 and words in refused.err
        assert not (tmp_path / "run" / "scan.json").exists()
