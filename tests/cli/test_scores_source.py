"""``prune --scores``: another cut from the scores of an earlier run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.checkpoint import Commands, read

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


@pytest.fixture(scope="module")
def scored(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_moe.cli.main import main

    out = tmp_path_factory.mktemp("scored")
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 8]
    main([str(a) for a in ("score", *QUIET, "--model.path", checkpoint, *data, "--out", out)])
    return out


def only_ean(scored: Path, folder: Path) -> Path:
    value = read(scored / "scores.json")
    value["methods"] = {"ean": value["methods"]["ean"]}
    (folder / "ean.json").write_text(json.dumps(value))
    return folder / "ean.json"


def prune(run: Commands, checkpoint: Path, *more: object) -> str:
    result = run("prune", *QUIET, "--model.path", checkpoint, *more)
    return "" if result.code == 0 else result.err


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_cut_as_their_statistics_do(
    run: Commands, checkpoint: Path, scored: Path, tmp_path: Path, scope: str
) -> None:
    cut = ("--method", "ean", "--ratio", 0.25, "--scope", scope)
    assert not prune(run, checkpoint, "--stats", scored, *cut, "--out", tmp_path / "stats")
    assert not prune(run, checkpoint, "--scores", scored, *cut, "--out", tmp_path / "scores")
    plans = [read(tmp_path / name / "plan.json") for name in ("stats", "scores")]
    assert plans[0]["keep"] == plans[1]["keep"]
    assert plans[1]["made_by"]["method"] == "ean"
    assert not (tmp_path / "scores" / "scores.json").exists()


def test_the_scores_of_a_run_folder_stay_as_they_are(
    run: Commands, checkpoint: Path, scored: Path, tmp_path: Path
) -> None:
    shutil.copytree(scored, tmp_path / "run")
    before = (tmp_path / "run" / "scores.json").read_bytes()
    assert not prune(run, checkpoint, "--scores", tmp_path / "run", "--method", "ean", "--out", tmp_path / "run")
    assert (tmp_path / "run" / "scores.json").read_bytes() == before


def test_a_file_of_one_method_needs_no_name(run: Commands, checkpoint: Path, scored: Path, tmp_path: Path) -> None:
    value = read(scored / "scores.json")
    value["methods"] = {"mine": value["methods"]["man"] | {"method": "mine"}}
    (tmp_path / "mine.json").write_text(json.dumps(value))
    assert not prune(run, checkpoint, "--scores", tmp_path / "mine.json", "--out", tmp_path / "out")
    assert not prune(run, checkpoint, "--stats", scored, "--method", "man", "--out", tmp_path / "man")
    assert read(tmp_path / "out" / "plan.json")["keep"] == read(tmp_path / "man" / "plan.json")["keep"]
    assert read(tmp_path / "out" / "summary.json")["method"] == "mine"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_id": "other@000000000000"}, "made for model other@000000000000"),
        ({"version": 9}, "version 9"),
        ({"methods": {}}, "no scores of any method"),
    ],
)
def test_foreign_scores_are_refused_in_one_line(
    run: Commands, checkpoint: Path, scored: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(read(scored / "scores.json") | change))
    error = prune(run, checkpoint, "--scores", tmp_path / "scores.json", "--out", tmp_path / "out")
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_scores_cannot_do_is_refused(run: Commands, checkpoint: Path, scored: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "merging needs statistics" in prune(run, checkpoint, "--scores", scored, "--merge", "true", *out)
    assert "--direction max" in prune(run, checkpoint, "--scores", scored, "--direction", "max", *out)
    assert "given: --stats and --scores" in prune(run, checkpoint, "--scores", scored, "--stats", scored, *out)
    assert "no scores of man" in prune(run, checkpoint, "--scores", only_ean(scored, tmp_path), "--method", "man", *out)
    assert "no such file" in prune(run, checkpoint, "--scores", tmp_path / "none", *out)
    assert not (tmp_path / "out").exists()
