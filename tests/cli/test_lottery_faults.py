"""Tuning that goes wrong, or is stopped."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.cli import rounds
from lightning_moe.modules.causal_lm import MoECausalLM
from tests.helpers.checkpoint import Commands, damaged_copy, edited_copy, read
from tests.helpers.processes import train_py, wait_for

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN = 16


def prune_args(checkpoint: Path, text: Path, *more: object) -> list[object]:
    data = ["--data.path", text / "harbour.txt", "--data.seq_len", SEQ_LEN, "--data.samples", 8, "--data.batch_size", 2]
    measured = ["--data.val_path", text / "island.txt", "--data.val_samples", 3]
    return ["prune", *QUIET, "--model.path", checkpoint, *data, *measured, "--method", "ean", *more]


TUNED = ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN)


def test_tuning_that_diverges_is_told_and_saves_no_model(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    said = run(*prune_args(checkpoint, text, *TUNED, "--finetune_lr", 1e30, "--out", tmp_path / "run"))
    assert said.code == 2 and "--finetune_lr 1e+30" in said.err and "diverged" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "prune.json").exists()


def test_a_ruined_model_has_no_perplexity(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """NaN is not left out of the sums, which would make it look perfect."""
    module = MoECausalLM(str(checkpoint))
    module.configure_model()
    with torch.no_grad():
        module.network.get_output_embeddings().weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    loss, count = module._domain_sums(0)
    loss.update(torch.tensor(math.nan, dtype=torch.float64))
    count.update(torch.tensor(3.0, dtype=torch.float64))
    assert math.isnan(float(loss.compute()))


def test_damaged_weights_are_refused_before_rounds(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    damaged = damaged_copy(checkpoint, tmp_path / "damaged")
    said = run(*prune_args(damaged, text, *TUNED, "--out", tmp_path / "run"))
    assert said.code == 2 and "finite" in said.err


def test_dropout_goes_on_where_it_was(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of chance travels in the saves."""
    noisy = edited_copy(checkpoint, tmp_path / "noisy", attention_dropout=0.3)
    args = prune_args(noisy, text, "--rounds", 1, "--finetune_tokens", 8 * SEQ_LEN)
    run.ok(*args, "--out", tmp_path / "whole")
    monkeypatch.setattr(rounds, "SAVE_SECONDS", 0.0)
    step, count = MoECausalLM.training_step, 0

    def dying(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("killed")
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MoECausalLM, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run(*args, "--out", tmp_path / "parts")
    torch.rand(7)
    assert "Going on from step 2 " in run.ok(*args, "--out", tmp_path / "parts").out
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_sigterm_leaves_by_its_own_code_and_goes_on(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """A scheduler must not take a stopped run for a finished one."""
    args = prune_args(checkpoint, text, "--rounds", 2, "--finetune_tokens", 4096, "--out", tmp_path / "run")
    process = train_py(*args)
    wait_for(lambda: any((tmp_path / "run").rglob("round-01/part.json")), process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err
    assert not (tmp_path / "run" / "prune.json").exists()
    run.ok(*args)
    assert read(tmp_path / "run" / "prune.json")["rounds"] == 2


def test_monitor_counts_are_what_a_record_keeps(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[dict[str, list[float]]] = []
    stock = ExpertUsageMonitor._look

    def look(monitor: ExpertUsageMonitor, *args: Any) -> None:
        stock(monitor, *args)
        looks.append(monitor.last)

    monkeypatch.setattr(ExpertUsageMonitor, "_look", look)
    run.ok(*prune_args(checkpoint, text, "--rounds", 2, "--out", tmp_path))
    from lightning_moe.pruning.round_record import read_records

    records = read_records(tmp_path / "rounds.jsonl")
    kept = [records[0].load["before_prune"], records[0].load["after_prune"], records[1].load["after_prune"]]
    assert [{name: layer["counts"] for name, layer in load.items() if name != "mean"} for load in kept] == looks
