"""Killed rounds go on: the same plan, records and weights, and no finished step is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
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
from tests.helpers.checkpoint import Commands, contents, read

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN = 16
ROOT = Path(__file__).parents[2]
CALIBRATION_BATCHES = 4

RUNS: dict[str, tuple[object, ...]] = {
    "lottery": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN),  # 2 steps, then 4
    "accumulated": ("--rounds", 2, "--finetune_tokens", 8 * SEQ_LEN, "--recovery.batch_tokens", 4 * SEQ_LEN),
    "many epochs": ("--rounds", 2, "--finetune_tokens", 16 * SEQ_LEN, "--recovery.batch_tokens", 6 * SEQ_LEN),
    "global": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--scope", "global", "--recovery.z_loss", 0.01),
    "router-kd": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--recovery.kind", "router-kd"),
    "diep": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--method", "diep", "--scope", "global"),
    "iterative": ("--rounds", 3, "--ratio", 0.375),
    "random": ("--rounds", 2, "--finetune_tokens", 4 * SEQ_LEN, "--method", "random"),
    "fading": ("--rounds", 3, "--ratio", 0.375, "--finetune_tokens", 32, "--finetune_growth", 0.1),
}
"""Options by name; ``fading`` tunes in its first round alone."""


def args_of(name: str, checkpoint: Path, text: Path, out: Path, batch_size: int = 2) -> list[str]:
    short = text / "short.txt" if name == "many epochs" else text / "harbour.txt"
    data = ["--data.path", short, "--data.seq_len", SEQ_LEN, "--data.samples", 8, "--data.batch_size", batch_size]
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


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at each step of tuning; short searches; no pictures."""
    often(monkeypatch)


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(search, "SAVE_EVERY", 1)
    monkeypatch.setitem(PRESETS, "default", {"updates": 3})
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


@pytest.fixture(scope="module")
def short_text(text: Path) -> Path:
    """Beside the other files a text of 7 windows: 3 batches an epoch."""
    words = (text / "harbour.txt").read_text()[:310]
    (text / "short.txt").write_text(words)
    return text


Whole = Callable[[str], tuple[Path, Work]]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Unbroken runs by name, and their work; each is made once."""
    made: dict[str, tuple[Path, Work]] = {}

    def run(name: str) -> tuple[Path, Work]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
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
    assert {name for name in contents(one)} == {name for name in contents(other)}


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


# ------------------------------------------------------------------------------------------------- each moment

OBSERVE = "lightning_moe.callbacks.expert_observation:ExpertObservation._next_batch"
MEASURE = "lightning_moe.modules.causal_lm:MoECausalLM.validation_step"
STEP = "lightning_moe.modules.causal_lm:MoECausalLM.training_step"
KD_STEP = "lightning_moe.modules.router_distillation:RouterDistillation.training_step"
ANSWER = "lightning_moe.cli.teacher:AnswerPass.predict_step"
SEARCH = "lightning_moe.search.diep:DiEPSearch.training_step"
SURGERY = "lightning_moe.cli.rounds:keep_experts"
SAVE = "lightning_moe.cli.rounds:save_model"
WRITE_MODEL = "lightning_moe.moe.checkpoints:write_model"
PART = "lightning_moe.cli.rounds:write_json"
RECORDS = "lightning_moe.cli.rounds:write_records"
EXPORT = "lightning_moe.cli.lottery:save_model"
CUT = "lightning_moe.cli.lottery:compact_checkpoint"
OWN_RECORDS = "lightning_moe.cli.lottery:write_records"
PLAN = "lightning_moe.pruning.plan:PruningPlan.save"
FINISH = "lightning_moe.cli.run_folder:RunFolder.finish"

MOMENTS: list[tuple[str, str, int, int, int]] = [
    # run, where, call, batches tuned on before, batches observed before, of which nothing is repeated
    ("lottery", OBSERVE, 2, 0, 0),
    ("lottery", OBSERVE, 6, 2, 4),
    ("lottery", MEASURE, 1, 0, 4),
    ("lottery", MEASURE, 4, 0, 4),
    ("lottery", MEASURE, 5, 2, 4),
    ("lottery", SURGERY, 1, 0, 4),
    ("lottery", SURGERY, 2, 2, 8),
    ("lottery", STEP, 1, 0, 4),
    ("lottery", STEP, 2, 1, 4),
    ("lottery", STEP, 3, 2, 8),
    ("lottery", STEP, 6, 5, 8),
    ("lottery", SAVE, 1, 2, 4),
    ("lottery", SAVE, 2, 6, 8),
    *(("lottery", PART, call, tuned, observed) for call, tuned, observed in (
        (1, 0, 0), (2, 0, 4), (3, 0, 4), (4, 2, 4), (5, 2, 4), (6, 2, 4), (7, 2, 8), (9, 6, 8), (10, 6, 8),
    )),
    ("lottery", RECORDS, 1, 2, 4),
    ("lottery", RECORDS, 2, 6, 8),
    ("lottery", OWN_RECORDS, 1, 2, 4),
    ("lottery", OWN_RECORDS, 3, 6, 8),
    ("lottery", EXPORT, 1, 6, 8),
    ("lottery", PLAN, 1, 6, 8),
    ("lottery", FINISH, 1, 6, 8),
    ("accumulated", STEP, 2, 0, 4),  # amid the first step of two batches
    ("accumulated", STEP, 3, 2, 4),
    ("accumulated", STEP, 8, 6, 8),
    ("accumulated", STEP, 12, 10, 8),
    ("global", STEP, 4, 3, 8),
    ("global", SAVE, 2, 6, 8),
    ("global", SURGERY, 2, 2, 8),
    ("router-kd", ANSWER, 2, 0, 0),
    ("router-kd", KD_STEP, 2, 1, 4),
    ("router-kd", KD_STEP, 5, 4, 8),
    ("random", STEP, 4, 3, 8),
    ("random", SURGERY, 2, 2, 8),
    ("iterative", OBSERVE, 6, 0, 4),
    ("iterative", MEASURE, 5, 0, 8),
    ("iterative", SURGERY, 3, 0, 12),
    ("iterative", CUT, 1, 0, 12),
    ("fading", OBSERVE, 6, 1, 4),
    ("fading", SAVE, 2, 1, 8),
    ("fading", OBSERVE, 10, 1, 8),
    ("fading", SAVE, 3, 1, 12),
]  # fmt: skip


@pytest.mark.parametrize(("name", "where", "call", "tuned", "observed"), MOMENTS)
def test_killed_it_goes_on_as_if_nothing_had_been(
    run: Commands,
    whole: Whole,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    name: str,
    where: str,
    call: int,
    tuned: int,
    observed: int,
) -> None:
    unbroken, work = whole(name)
    args = args_of(name, checkpoint, text, tmp_path)
    died = die(run, args, where, call)
    assert not (tmp_path / "prune.json").exists()
    assert died.tuned == work.tuned[: len(died.tuned)]
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == work.tuned[tuned:]
    assert rest.observed == work.observed - observed


@pytest.mark.parametrize("call", range(1, 14))
def test_killed_amid_epochs(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """A text gone through several times, 3 batches an epoch; a step of 3 batches; 3 steps, then 5."""
    unbroken, work = whole("many epochs")
    assert len({tuple(windows) for windows in work.tuned[:3]}) == 3 and len(work.tuned) > 12
    args = args_of("many epochs", checkpoint, text, tmp_path)
    die(run, args, STEP, call)
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == work.tuned[(call - 1) // 3 * 3 :]


@pytest.mark.parametrize("call", [1, 2, 3, 5, 6])
def test_killed_in_a_search(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """Three updates a round, each saved."""
    unbroken, work = whole("diep")
    args = args_of("diep", checkpoint, text, tmp_path)
    die(run, args, SEARCH, call)
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == (work.tuned if call <= 3 else work.tuned[2:])


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_killed_with_half_a_model_written(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """The models of both rounds, and the last one."""
    unbroken, work = whole("lottery")
    args = args_of("lottery", checkpoint, text, tmp_path)
    if call == 4:
        with pytest.raises(AssertionError):
            ...
