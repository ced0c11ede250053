"""Rounds that are killed somewhere and go on, beside unbroken ones, and what each process did of the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_moe.callbacks.expert_observation import ExpertObservation
from lightning_moe.cli import lottery as command
from lightning_moe.cli import rounds, search
from lightning_moe.cli.main import main
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.modules.router_distillation import RouterDistillation
from lightning_moe.search.presets import PRESETS
from tests.helpers.checkpoint import Commands, contents, read, write_text

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN = 16
SHORT = 220
"""Characters of the short text."""

RUNS: dict[str, tuple[object, ...]] = {
    "lottery": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN),  # 2 steps, then 4
    "accumulated": ("--rounds", 2, "--finetune_tokens", 8 * SEQ_LEN, "--recovery.batch_tokens", 4 * SEQ_LEN),
    "many epochs": ("--rounds", 2, "--finetune_tokens", 16 * SEQ_LEN, "--recovery.batch_tokens", 4 * SEQ_LEN),
    "global": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--scope", "global", "--recovery.z_loss", 0.01),
    "router-kd": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--recovery.kind", "router-kd"),
    "diep": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--method", "diep", "--scope", "global"),
    "iterative": ("--rounds", 3, "--ratio", 0.375),
    "random": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--method", "random"),
    "fading": ("--rounds", 3, "--ratio", 0.375, "--finetune_tokens", 32, "--finetune_growth", 0.01),
}
"""Options by name; ``fading`` tunes in its first round alone."""

STEP = "lightning_moe.modules.causal_lm:MoECausalLM.training_step"
KD_STEP = "lightning_moe.modules.router_distillation:RouterDistillation.training_step"
SURGERY = "lightning_moe.cli.rounds:keep_experts"
"""Where they die."""


def args_of(name: str, checkpoint: Path, text: Path, out: Path, batch_size: int = 2) -> list[str]:
    calibration = text.with_name("short") / "short.txt" if name == "many epochs" else text / "harbour.txt"
    data = ["--data.path", calibration, "--data.seq_len", SEQ_LEN, "--data.samples", 8, "--data.batch_size", batch_size]
    measured = ["--data.val_path", text / "island.txt", "--data.val_samples", 3]
    cut = () if "--method" in RUNS[name] else ("--method", "ean")
    all_args = ["prune", *QUIET, "--model.path", checkpoint, *data, *measured, *cut, *RUNS[name], "--out", out]
    return [str(arg) for arg in all_args]


class Killed(RuntimeError):
    """Stands for a kill: nothing in the package knows it."""


class Work:
    """What one process did: windows of the batches it tuned on, and batches it observed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tuned: list[list[int]] = []
        self.observed = 0
        for kind in (MoECausalLM, RouterDistillation):
            self._watch_steps(monkeypatch, kind)
        stock = ExpertObservation._next_batch

        def next_batch(observation: ExpertObservation, batch: Any) -> None:
            stock(observation, batch)
            self.observed += 1

        monkeypatch.setattr(ExpertObservation, "_next_batch", next_batch)

    def _watch_steps(self, monkeypatch: pytest.MonkeyPatch, kind: type[MoECausalLM]) -> None:
        stock = kind.training_step

        def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.tuned.append(batch["window"].tolist())
            return stock(module, batch, batch_idx)

        monkeypatch.setattr(kind, "training_step", step)


def kill(monkeypatch: pytest.MonkeyPatch, where: str, call: int, *, after: bool = False) -> None:
    """Die before, or right after, a function is called for the ``call``-th time."""
    stock, calls = resolve_name(where), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = stock(*args, **kwargs)
        if calls == call:
            raise Killed
        return result

    monkeypatch.setattr(where.replace(":", "."), dying)


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(search, "SAVE_EVERY", 1)
    monkeypatch.setitem(PRESETS, "default", {"updates": 3})
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


Whole = Callable[[str], tuple[Path, Work]]


def whole_runs(checkpoint: Path, text: Path, factory: pytest.TempPathFactory) -> Whole:
    """Unbroken runs by name, and their work; each is made once. One needs a text of 7 windows: 3 batches an epoch."""
    write_text(text.with_name("short") / "short.txt", [(text / "harbour.txt").read_text()[:SHORT]])
    made: dict[str, tuple[Path, Work]] = {}

    def run(name: str) -> tuple[Path, Work]:
        if name not in made:
            folder = factory.mktemp("whole")
            with pytest.MonkeyPatch.context() as patch:
                often(patch)
                work = Work(patch)
                main(args_of(name, checkpoint, text, folder))
            made[name] = folder, work
        return made[name]

    return run


def plain(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("seconds", "tokens_per_second")}
    return value


def records(folder: Path) -> list[Any]:
    return [plain(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_ends_alike(one: Path, other: Path) -> None:
    assert (one / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    assert records(one) == records(other)
    assert plain(read(one / "prune.json")) == plain(read(other / "prune.json"))
    mine, yours = weights(one), weights(other)
    assert mine.keys() == yours.keys()
    assert [name for name in mine if not torch.equal(mine[name], yours[name])] == []
    assert set(contents(one)) == set(contents(other))


def die(run: Commands, args: list[str], where: str, call: int, *, after: bool = False) -> Work:
    """Run a command that is killed there; what it did."""
    with pytest.MonkeyPatch.context() as patch:
        work = Work(patch)
        kill(patch, where, call, after=after)
        with pytest.raises(Killed):
            run(*args)
    return work


def go_on(run: Commands, args: list[str]) -> Work:
    with pytest.MonkeyPatch.context() as patch:
        work = Work(patch)
        run.ok(*args)
    return work
