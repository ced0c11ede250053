"""A command again in the same folder: what is done is not done twice, and another request is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands, contents, read
from tests.helpers.command_runs import LAYERS, QUIET, SAMPLES, assert_true_prune_figures, model_args, text_args


class Passes:
    """Counts the batches that went through an observation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        stock = ExpertObservation._next_batch

        def counting(observation: ExpertObservation, batch: Any) -> None:
            self.batches += 1
            stock(observation, batch)

        monkeypatch.setattr(ExpertObservation, "_next_batch", counting)


def test_score_and_prune_in_one_folder_observe_once(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    once = passes.batches
    assert once == math.ceil(SAMPLES / 4)
    run.ok("prune", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    assert passes.batches == once


def test_statistics_of_other_text_are_not_reused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    once = passes.batches
    run.ok("prune", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    assert passes.batches > once
    assert read(tmp_path / "prune.json")["data_fingerprint"] != read(tmp_path / "score.json")["data_fingerprint"]


def test_score_repeats_when_a_prune_has_replaced_its_statistics(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """A finished score whose statistics lie there no more is not finished."""
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    run.ok("prune", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    stored = load_stats(tmp_path / "stats.safetensors")
    assert stored.data_fingerprint == read(tmp_path / "score.json")["data_fingerprint"]


REQUESTS: dict[str, list[object]] = {
    "score": [],
    "prune": ["--method", "seer", "--ratio", 0.5],
    "evaluate": [],
}
OTHERS: dict[str, list[object]] = {
    "score": ["--data.samples", 7],
    "prune": ["--ratio", 0.25],
    "evaluate": ["--data.seq_len", 16],
}


@pytest.mark.parametrize("command", REQUESTS)
def test_same_request_does_nothing_another_is_refused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, command: str
) -> None:
    args = [command, *model_args(checkpoint), *text_args(text), *REQUESTS[command], "--out", tmp_path]
    run.ok(*args)
    before = contents(tmp_path)
    run.ok(*args)
    assert contents(tmp_path) == before
    run.ok(*args, "--data.batch_size", 7)  # changes no result, so it is no other request
    assert contents(tmp_path) == before
    refused = run(*args, *OTHERS[command])
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert str(tmp_path) in refused.err
    assert "--overwrite" in refused.err
    assert contents(tmp_path) == before
    first = read(tmp_path / f"{command}.json")
    run.ok(*args, *OTHERS[command], "--overwrite", "true")
    assert read(tmp_path / f"{command}.json")["request"] != first["request"]
    assert read(tmp_path / "summary.json") == read(tmp_path / f"{command}.json")
    if command == "prune":
        assert read(tmp_path / "prune.json")["kept_experts"] == dict.fromkeys(LAYERS, 6)
        assert_true_prune_figures(tmp_path, checkpoint)


def test_text_that_changed_is_another_request(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes((text / "harbour.txt").read_bytes())
    args = ["score", *model_args(checkpoint), *text_args(file), "--out", tmp_path / "run"]
    run.ok(*args)
    file.write_text(file.read_text() + " More.")
    assert run(*args).code == 2


def test_overwrite_does_it_again(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refused repetition promises: not the old statistics under a new date."""
    args = ["score", *model_args(checkpoint), *text_args(text), "--out", tmp_path]
    run.ok(*args)
    passes = Passes(monkeypatch)
    run.ok(*args, "--overwrite", "true")
    assert passes.batches == math.ceil(SAMPLES / 4)


def test_statistics_of_another_dtype_are_not_reused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    passes = Passes(monkeypatch)
    run.ok("prune", *model_args(checkpoint), *text_args(text), "--model.dtype", "bfloat16", "--out", tmp_path)
    assert passes.batches > 0


def test_text_changed_in_its_middle_is_another_request(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(text, tmp_path / "text"))
    args = ("--model.path", checkpoint, "--data.path", copy, "--out", tmp_path / "out")
    run.ok("evaluate", *QUIET, *args)
    file = copy / "harbour.txt"
    content = file.read_text()
    middle = len(content) // 2
    file.write_text(content[:middle] + "xyzzy" + content[middle + 5 :])
    assert run("evaluate", *QUIET, *args).code == 2


def test_a_bare_overwrite_is_a_yes_and_one_spelling_is_as_good_as_another(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    args = ["evaluate", *QUIET, "--data.path", text, "--out", tmp_path / "out"]
    run.ok(*args, "--model.path", checkpoint, "--data.samples", 2)
    assert run(*args, "--model.path", checkpoint, "--data.samples", 3).code == 2
    run.ok(*args, "--model.path", checkpoint, "--data.samples", 3, "--overwrite")
    again = run.ok(*args, "--model.path", f"{checkpoint}/../{checkpoint.name}", "--data.samples", 3)
    assert "before" in again.out


def test_another_precision_is_another_request(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    args = ("evaluate", *QUIET, "--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
    run.ok(*args, "--trainer.precision", "bf16-true")
    assert "precision" in run(*args).err
