"""What happens to a job when one of its two processes fails: it ends, says why in a line, and can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import ROOT, train_py, wait_for

TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "moe_fsdp")


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def lottery(checkpoint: Path, text: Path, out: Path, tokens: int = 4096) -> list[str]:
    data = ["--model.path", checkpoint, "--data.path", text, "--data.seq_len", 16, "--data.samples", 12]
    data += ["--data.batch_size", 2, "--trainer.enable_progress_bar", "false"]
    rounds = ["--method", "ean", "--ratio", 0.5, "--rounds", 2, "--finetune_tokens", tokens, "--finetune_lr", 0.001]
    return [str(word) for word in ("prune", *data, *rounds, *TWO, "--out", out)]


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(fault: str, words: list[str], **environment: object) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    return subprocess.run(
        [sys.executable, *LAUNCH, "-m", "tests.helpers.faulty_rank", fault, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env=own | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()},
    )


def tuning(out: Path) -> bool:
    """Whether the first cut is made and measured, so that its model is being tuned or soon will be."""
    return any("after_prune" in part.read_text() for part in out.glob(".partial/*/round-01/part.json"))


def our_lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    """What we say; torchrun adds a report of its own."""
    return [line for line in run.stderr.splitlines() if line.startswith("lightning-moe:")]


def same_ends(one: Path, other: Path) -> None:
    assert read(one / "plan.json")["keep"] == read(other / "plan.json")["keep"]
    mine, yours = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    assert mine.keys() == yours.keys()
    assert [name for name in mine if not torch.equal(mine[name], yours[name])] == []


def nothing_half_written(out: Path) -> None:
    """Results are whole or not there; models under their names can be read."""
    assert not (out / "model").exists() and not (out / "plan.json").exists()
    for file in out.rglob("*.safetensors"):
        if ".partial" not in file.parent.name:
            load_file(file)
    for file in out.rglob("*.json"):
        json.loads(file.read_text())


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = train_py(*lottery(checkpoint, text, out))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out


@pytest.mark.scale
@pytest.mark.parametrize("victim", ["second", "first"])
def test_a_process_is_killed(checkpoint: Path, text: Path, undisturbed: Path, tmp_path: Path, victim: str) -> None:
    """In the midst of tuning, started by Lightning: no process is left, a line says why, the same command goes on."""
    out = tmp_path / "run"
    process = train_py(*lottery(checkpoint, text, out))
    wait_for(lambda: tuning(out), process)
    children = psutil.Process(process.pid).children()
    (child,) = [one for one in children if "train.py" in " ".join(one.cmdline())]
    (child if victim == "second" else process).send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("lightning-moe:")]
    assert len(lines) == 1 and "another process of this job is gone" in lines[0], said
    assert "Traceback" not in said
    nothing_half_written(out)
    again = train_py(*lottery(checkpoint, text, out))
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    same_ends(out, undisturbed)


@pytest.mark.scale
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_job_is_told_to_stop(checkpoint: Path, text: Path, undisturbed: Path, tmp_path: Path, launcher: str) -> None:
    """By TERM, as a scheduler does: all its processes end soon, none with a traceback; the same command goes on."""
    out = tmp_path / "run"
    words = lottery(checkpoint, text, out)
    process = train_py(*words, launch=LAUNCH if launcher == "torchrun" else ())
    wait_for(lambda: tuning(out), process)
    ranks = [process, *psutil.Process(process.pid).children()]
    process.terminate()
    _, said = process.communicate(timeout=60)  # the pipes are open while any of them lives
    psutil.wait_procs(ranks[1:], timeout=10)
    assert not any(rank.is_running() for rank in ranks[1:])
    assert process.returncode == (128 + signal.SIGTERM if launcher == "lightning" else 1)
    of_ranks = said.partition("torch/distributed/run.py")[0]  # torchrun's own farewell is a traceback
    assert "Error" not in of_ranks and (launcher == "torchrun" or "Traceback" not in said), said
    nothing_half_written(out)
    again = train_py(*words)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    same_ends(out, undisturbed)


@pytest.mark.scale
def test_a_process_dies_under_torchrun(checkpoint: Path, text: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Where the tuned model of the second round would be written."""
    out = tmp_path / "run"
    words = lottery(checkpoint, text, out)
    run = torchrun("dies", words, DIES=1, DURING="export_model")
    assert run.returncode != 0
    lines = our_lines(run)
    assert len(lines) <= 1 and all("another process of this job is gone" in line for line in lines), run.stderr
    nothing_half_written(out)
    assert torchrun("none", words).returncode == 0
    same_ends(out, undisturbed)


@pytest.mark.scale
def test_a_full_disk(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = torchrun("full-disk", lottery(checkpoint, text, out, tokens=64))
    assert run.returncode != 0
    assert len(our_lines(run)) == 1 and "File too large" in our_lines(run)[0], run.stderr
    nothing_half_written(out)


@pytest.mark.scale
@pytest.mark.parametrize("fault", ["other-text", "other-model", "cut-shard"])
def test_ranks_that_see_different_things(checkpoint: Path, text: Path, tmp_path: Path, fault: str) -> None:
    """Another text, another model, or a shard that one of them cannot read."""
    if fault == "other-text":
        other = tmp_path / "other.txt"
        other.write_text("Nothing of what the other one reads. " * 200)
        said = "rank 0 has"
    else:
        other = tmp_path / "tiny"
        shutil.copytree(checkpoint, other)
        file = other / "model.safetensors"
        stored = bytearray(file.read_bytes())
        if fault == "other-model":
            stored[-3] ^= 1
            said = "rank 0 has"
        else:
            stored = stored[:20]
            said = "rank 1:"
        file.write_bytes(stored)
    words = ["evaluate", "--model.path", checkpoint, "--data.path", text, "--data.seq_len", 16, "--data.samples", 8]
    words += ["--data.batch_size", 2, *TWO, "--out", tmp_path / "run"]
    run = torchrun(fault.replace("cut-shard", "other-model"), [str(word) for word in words], OTHER=other)
    assert run.returncode != 0
    lines = our_lines(run)
    assert len(lines) == 1 and said in lines[0], run.stderr
    assert "Traceback" not in "".join(line for line in run.stderr.splitlines() if "rank" in line.split(":")[0])
    assert not (tmp_path / "run" / "evaluate.json").exists()
