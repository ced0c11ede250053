"""Killed anywhere, the same command goes on, and no model is ever half there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.moe import compaction
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import Commands
from tests.helpers.command_runs import (
    QUIET,
    assert_equal_stats,
    assert_true_prune_figures,
    logits_of,
    model_args,
    text_args,
)


class Killed(RuntimeError):
    """Stands for a kill: nothing in the package knows it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Saves every 2 batches and, while armed, dies at the start of a given batch."""
    state = {"armed": True, "seen": 0}

    def arm(batches: int) -> dict[str, Any]:
        stock_init, stock_next = ExpertObservation.__init__, ExpertObservation._next_batch

        def init(
            observation: ExpertObservation, partial: Path | None = None, resume: Any = None, **kwargs: Any
        ) -> None:
            stock_init(observation, partial, resume, save_every=2, **kwargs)

        def next_batch(observation: ExpertObservation, batch: Any) -> None:
            if state["armed"] and state["seen"] == batches:
                raise Killed
            state["seen"] += 1
            stock_next(observation, batch)

        monkeypatch.setattr(ExpertObservation, "__init__", init)
        monkeypatch.setattr(ExpertObservation, "_next_batch", next_batch)
        return state

    return arm


@pytest.mark.parametrize("killed_after", [1, 2, 5, 9])
@pytest.mark.parametrize("command", ["score", "prune"])
def test_a_killed_pass_continues(
    run: Commands,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    kill_after: Any,
    command: str,
    killed_after: int,
) -> None:
    args = [command, *model_args(checkpoint), *text_args(text, batch_size=2)]
    run.ok(*args, "--out", tmp_path / "whole")
    state = kill_after(killed_after)
    with pytest.raises(Killed):
        run(*args, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "stats.safetensors").exists()
    state["armed"], state["seen"] = False, 0
    run.ok(*args, "--out", tmp_path / "killed")
    saved = killed_after // 2 * 2  # of 10 batches in all
    assert state["seen"] == 10 - saved
    whole, continued = (load_stats(tmp_path / name / "stats.safetensors") for name in ("whole", "killed"))
    assert_equal_stats(whole, continued, exact=True)
    assert not (tmp_path / "killed" / ".partial").exists()


def test_killed_after_the_last_batch(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, kill_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches are saved; the figures of the weights, which may take long, were not yet."""
    args = ["score", *model_args(checkpoint), *text_args(text, batch_size=2)]
    run.ok(*args, "--out", tmp_path / "whole")
    state = kill_after(99)
    with monkeypatch.context() as patch:

        def die(observation: Observation, *args: Any) -> None:
            raise Killed

        patch.setattr(Observation, "compute", die)
        with pytest.raises(Killed):
            run(*args, "--out", tmp_path / "killed")
    state["seen"] = 0
    run.ok(*args, "--out", tmp_path / "killed")
    assert state["seen"] == 0
    whole, continued = (load_stats(tmp_path / name / "stats.safetensors") for name in ("whole", "killed"))
    assert_equal_stats(whole, continued, exact=True)


def test_a_killed_pass_continues_under_overwrite(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, kill_after: Any
) -> None:
    """The same command again continues, whatever its options."""
    args = ["score", *model_args(checkpoint), *text_args(text, batch_size=2), "--overwrite", "true", "--out", tmp_path]
    state = kill_after(6)
    with pytest.raises(Killed):
        run(*args)
    state["armed"], state["seen"] = False, 0
    run.ok(*args)
    assert state["seen"] == 4


def test_a_killed_pass_continues_with_another_batch_size(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, kill_after: Any
) -> None:
    """The batch size is no part of the request, so what was done must not be counted in batches of another size."""
    state = kill_after(4)
    args = ["score", *model_args(checkpoint), "--out", tmp_path]
    with pytest.raises(Killed):
        run(*args, *text_args(text, batch_size=2))
    state["armed"] = False
    run.ok(*args, *text_args(text, batch_size=4))
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=False)


def test_another_request_does_not_continue_a_killed_pass(
    run: Commands, checkpoint: Path, text: Path, stats_file: Path, tmp_path: Path, kill_after: Any
) -> None:
    state = kill_after(3)
    with pytest.raises(Killed):
        run("score", *model_args(checkpoint), *text_args(text / "island.txt"), "--out", tmp_path)
    state["armed"] = False
    run.ok("score", *model_args(checkpoint), *text_args(text), "--out", tmp_path)
    assert_equal_stats(load_stats(tmp_path / "stats.safetensors"), load_stats(stats_file), exact=True)


def test_killed_while_writing_the_model(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["prune", *model_args(checkpoint), "--stats", stats_file]
    run.ok(*args, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:

        def write_half(tensors: Any, folder: Path, shard_bytes: int) -> None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise Killed

        patch.setattr(compaction, "write_shards", write_half)
        with pytest.raises(Killed):
            run(*args, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "model").exists()
    assert not (tmp_path / "killed" / "prune.json").exists()
    run.ok(*args, "--out", tmp_path / "killed")
    assert_true_prune_figures(tmp_path / "killed", checkpoint)
    assert torch.equal(logits_of(tmp_path / "killed" / "model"), logits_of(tmp_path / "whole" / "model"))


def test_a_real_kill_leaves_no_half_model(run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path) -> None:
    """What SIGKILL leaves beside the target is cleared by the same command."""
    script = (
        "import os, sys\n"
        "from lightning_moe.cli.main import main\n"
        "from lightning_moe.moe import compaction\n"
        "def die(tensors, folder, shard_bytes):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    os._exit(9)\n"
        "compaction.write_shards = die\n"
        "main(sys.argv[1:])\n"
    )
    args = [str(arg) for arg in ("prune", *model_args(checkpoint), "--stats", stats_file, "--out", tmp_path / "run")]
    assert subprocess.run([sys.executable, "-c", script, *args], capture_output=True).returncode == 9
    assert not (tmp_path / "run" / "model").exists()
    run.ok(*args)
    assert_true_prune_figures(tmp_path / "run", checkpoint)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "model",
        "plan.json",
        "scores.json",
        "prune.json",
        "summary.json",
    }


def test_a_replaced_model_is_never_half_there(
    run: Commands, checkpoint: Path, stats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwriting keeps the old model until the new one is whole."""
    args = ["prune", *model_args(checkpoint), "--stats", stats_file, "--out", tmp_path]
    run.ok(*args)
    before = logits_of(tmp_path / "model")

    def die(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(compaction, "write_shards", die)
    with pytest.raises(Killed):
        run(*args, "--ratio", 0.25, "--overwrite", "true")
    assert torch.equal(logits_of(tmp_path / "model"), before)


def test_a_kill_between_model_and_plan_leaves_no_lie(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("prune", *QUIET, "--model.path", checkpoint, "--data.path", text, "--out", tmp_path / "out")
    run.ok(*args, "--ratio", 0.25)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_moe.pruning.plan.PruningPlan.save", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
        run(*args, "--ratio", 0.5, "--overwrite")
    run.ok(*args, "--ratio", 0.25)
    kept = {len(ids) for ids in json.loads((tmp_path / "out" / "plan.json").read_text())["keep"].values()}
    assert (
        kept == {6} and AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.num_local_experts == 6
    )
