"""Rounds in processes of their own: killed in earnest, and on two ranks."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.killed_rounds import QUIET, SEQ_LEN, args_of, assert_ends_alike, often, records, weights
from tests.helpers.checkpoint import Commands, read
from tests.helpers.processes import train_py


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at each step of tuning; short searches; no pictures."""
    often(monkeypatch)


def kill_when(found: Callable[[], bool], wait: float, *args: object) -> bool:
    """Run, and SIGKILL so many seconds after something is there; whether the process had not come to its end."""
    process, end = train_py(*args), time.monotonic() + 120
    try:
        while not found() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(wait)
    finally:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


@pytest.mark.scale
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill(run: Commands, checkpoint: Path, text: Path, tmp_path: Path, seed: int) -> None:
    """Three kills in one folder, at about these moments."""
    torch.set_num_threads(1)
    data = ("--data.path", text, "--data.seq_len", SEQ_LEN, "--data.samples", 40, "--data.batch_size", 2)
    tuned = ("--rounds", 2, "--finetune_tokens", 4096, "--method", "ean")
    args = ["prune", *QUIET, "--model.path", checkpoint, *data, *tuned]
    chance, parts = random.Random(seed), tmp_path / "parts"
    kills = [
        kill_when(lambda: any(parts.rglob(pattern)), 0.5 * chance.random(), *args, "--out", parts)  # noqa: B023
        for pattern in ("round-01/part.json", "round-01/model/*", "round-02/part.json")
    ]
    assert kills[0]
    run.ok(*args, "--out", parts)
    run.ok(*args, "--out", tmp_path / "whole")
    assert_ends_alike(parts, tmp_path / "whole")


@pytest.mark.scale
@pytest.mark.parametrize("name", ["lottery", "global", "router-kd"])
def test_two_ranks_keep_what_one_with_batches_twice_as_large_keeps(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, name: str
) -> None:
    """Full windows, and without the load-balance loss, which is no mean over ranks."""
    more = ["--finetune_lr", "0.001"] + ([] if name == "router-kd" else ["--recovery.load_balance", "0"])
    two, one = (args_of(name, checkpoint, text, tmp_path / ranks, 4 // int(ranks)) for ranks in "21")
    process = train_py(*two, *more, "--trainer.strategy=ddp", "--trainer.devices=2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run.ok(*one, *more)
    assert [read(tmp_path / ranks / "prune.json")["world_size"] for ranks in "12"] == [1, 2]
    mine, yours = records(tmp_path / "1"), records(tmp_path / "2")
    for one_record, two_record in zip(mine, yours, strict=True):
        for same in ("keep", "dropped", "tokens", "steps", "lr"):
            assert one_record[same] == two_record[same], same
        for moment, figures in one_record["perplexity"].items():
            assert two_record["perplexity"][moment]["all"] == pytest.approx(figures["all"], rel=1e-3)
    whole, halves = weights(tmp_path / "1"), weights(tmp_path / "2")
    for tensor_name, tensor in whole.items():
        torch.testing.assert_close(halves[tensor_name], tensor, rtol=1e-3, atol=1e-4)
