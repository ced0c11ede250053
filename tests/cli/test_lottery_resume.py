"""Killed rounds go on: the same plan, records and weights, and no finished step is done twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
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
from tests.helpers.checkpoint import Commands, contents, edited_copy, read, write_text
from tests.helpers.processes import train_py
from tests.helpers.thinning import thinned

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


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at each step of tuning; short searches; no pictures."""
    often(monkeypatch)


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(search, "SAVE_EVERY", 1)
    monkeypatch.setitem(PRESETS, "default", {"updates": 3})
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


Whole = Callable[[str], tuple[Path, Work]]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Unbroken runs by name, and their work; each is made once. One needs a text of 7 windows: 3 batches an epoch."""
    write_text(text.with_name("short") / "short.txt", [(text / "harbour.txt").read_text()[:SHORT]])
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


# ------------------------------------------------------------------------------------------------- each moment

OBSERVE = "lightning_moe.callbacks.expert_observation:ExpertObservation._next_batch"
MEASURE = "lightning_moe.modules.causal_lm:MoECausalLM.validation_step"
STEP = "lightning_moe.modules.causal_lm:MoECausalLM.training_step"
KD_STEP = "lightning_moe.modules.router_distillation:RouterDistillation.training_step"
ANSWER = "lightning_moe.cli.teacher:AnswerPass.predict_step"
SEARCH = "lightning_moe.search.diep:DiEPSearch.training_step"
SURGERY = "lightning_moe.cli.rounds:keep_experts"
SAVE = "lightning_moe.cli.rounds:export_model"
WRITE_MODEL = "lightning_moe.moe.checkpoints:write_model"
PART = "lightning_moe.cli.rounds:write_json"
RECORDS = "lightning_moe.cli.rounds:write_records"
EXPORT = "lightning_moe.cli.lottery:export_model"
CUT = "lightning_moe.cli.lottery:compact_checkpoint"
OWN_RECORDS = "lightning_moe.cli.lottery:write_records"
PLAN = "lightning_moe.pruning.plan:PruningPlan.save"
CHECKPOINT = "lightning.pytorch.trainer.trainer:Trainer.save_checkpoint"
FINISH = "lightning_moe.cli.run_folder:RunFolder.finish"

MOMENTS: list[tuple[str, str, int, int, int]] = [
    # run, where, call, batches tuned on and batches observed that are not done again
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
        (1, 0, 4), (2, 0, 4), (3, 0, 4), (4, 2, 4), (5, 2, 4), (6, 2, 8), (7, 2, 8), (9, 6, 8), (10, 6, 8),
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


@pytest.mark.parametrize(("name", "where", "call", "tuned", "observed"), thinned(MOMENTS, 3))
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
    """``tuned`` and ``observed`` batches are not done again."""
    unbroken, work = whole(name)
    args = args_of(name, checkpoint, text, tmp_path)
    died = die(run, args, where, call)
    assert not (tmp_path / "prune.json").exists()
    assert died.tuned == work.tuned[: len(died.tuned)]
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == work.tuned[tuned:]
    assert rest.observed == work.observed - observed


@pytest.mark.parametrize(
    ("where", "call", "tuned", "observed"),
    thinned(
        [
            (CHECKPOINT, 1, 0, 4),  # a save is written, but has no name yet
            (CHECKPOINT, 4, 3, 8),
            (WRITE_MODEL, 1, 2, 4),  # a model is written, but has no name yet
            (WRITE_MODEL, 2, 6, 8),
            (WRITE_MODEL, 3, 6, 8),
            (SAVE, 1, 2, 4),
            (PART, 4, 2, 4),
            (RECORDS, 1, 2, 4),
            (RECORDS, 2, 6, 8),
            (EXPORT, 1, 6, 8),
            (PLAN, 1, 6, 8),
        ],
        3,
    ),
)
def test_killed_right_after(
    run: Commands,
    whole: Whole,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    where: str,
    call: int,
    tuned: int,
    observed: int,
) -> None:
    unbroken, work = whole("lottery")
    args = args_of("lottery", checkpoint, text, tmp_path)
    die(run, args, where, call, after=True)
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == work.tuned[tuned:]
    assert rest.observed == work.observed - observed


@pytest.mark.parametrize("call", thinned([2, 3, 4, 5, 6, 9, 11, 18], 3))
def test_killed_amid_epochs(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """A text gone through several times, in steps of two batches; the third batch of an epoch is a step alone."""
    unbroken, work = whole("many epochs")
    assert len(work.tuned) == 18 and len({window for batch in work.tuned for window in batch}) == 7
    args = args_of("many epochs", checkpoint, text, tmp_path)
    die(run, args, STEP, call)
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    done = call - 1
    assert rest.tuned == work.tuned[done - (done % 3 == 1) :]


@pytest.mark.parametrize("call", thinned([1, 2, 3, 5, 6], 3))
def test_killed_in_a_search(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """Three updates a round, each saved."""
    unbroken, work = whole("diep")
    args = args_of("diep", checkpoint, text, tmp_path)
    die(run, args, SEARCH, call)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, SEARCH, 6 - call + 2)  # it has no more than what is left to do
        rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == (work.tuned if call <= 3 else work.tuned[2:])


@pytest.mark.parametrize(
    ("name", "where", "calls"),
    thinned(
        [
            ("lottery", STEP, (2, 3, 5)),
            ("accumulated", STEP, (4, 8)),
            ("many epochs", STEP, (3, 4, 5, 6, 9)),  # the third batch ends an epoch
            ("router-kd", KD_STEP, (2, 5)),
        ],
        2,
    ),
)
def test_killed_with_dropout(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, name: str, where: str, calls: tuple[int, ...]
) -> None:
    """What chance takes from attention is the same after a kill, which meanwhile has used it otherwise."""
    write_text(text.with_name("short") / "short.txt", [(text / "harbour.txt").read_text()[:SHORT]])
    noisy = edited_copy(checkpoint, tmp_path / "noisy", attention_dropout=0.2)
    run.ok(*args_of(name, noisy, text, tmp_path / "whole"))
    run.ok(*args_of(name, checkpoint, text, tmp_path / "quiet"))
    unbroken, quiet = weights(tmp_path / "whole"), weights(tmp_path / "quiet")
    assert any(not torch.equal(unbroken[weight], quiet[weight]) for weight in unbroken), "else this test says nothing"
    for call in calls:
        args = args_of(name, noisy, text, tmp_path / str(call))
        die(run, args, where, call)
        torch.rand(call)
        go_on(run, args)
        assert_ends_alike(tmp_path / str(call), tmp_path / "whole")


@pytest.mark.parametrize(("where", "call"), thinned([(STEP, 2), (PART, 2), (OBSERVE, 5)], 2))
def test_killed_again_and_again(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, where: str, call: int
) -> None:
    """Each process gets one step further, and in the end that is the whole way."""
    unbroken, work = whole("lottery")
    args, tuned, deaths = args_of("lottery", checkpoint, text, tmp_path), [], 0
    while not (tmp_path / "prune.json").exists():
        with pytest.MonkeyPatch.context() as patch:
            done = Work(patch)
            kill(patch, where, call)
            try:
                run.ok(*args)
            except Killed:
                deaths += 1
                assert deaths < 20
            tuned += done.tuned
    assert deaths > 0
    assert_ends_alike(tmp_path, unbroken)
    assert tuned == work.tuned  # no batch was seen twice, all in their order


def test_killed_under_overwrite(run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Replacing the results of another request goes on, too."""
    run.ok(*args_of("iterative", checkpoint, text, tmp_path))
    unbroken, work = whole("lottery")
    args = [*args_of("lottery", checkpoint, text, tmp_path), "--overwrite", "true"]
    die(run, args, STEP, 4)
    assert not (tmp_path / "prune.json").exists()
    assert go_on(run, args).tuned == work.tuned[3:]
    assert_ends_alike(tmp_path, unbroken)


def test_another_request_does_not_go_on_from_this_one(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    unbroken, work = whole("lottery")
    args = args_of("lottery", checkpoint, text, tmp_path)
    die(run, [*args, "--finetune_lr", "0.001"], STEP, 4)
    assert go_on(run, args).tuned == work.tuned
    (left,) = (tmp_path / ".partial").iterdir()  # of the other one, which may be wanted
    shutil.rmtree(left.parent)
    assert_ends_alike(tmp_path, unbroken)


@pytest.mark.parametrize(("where", "call"), [(SURGERY, 1), (STEP, 4)])
def test_gradient_checkpointing_is_on_again(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """What fits into memory in one run does so after a kill."""
    args = [*args_of("lottery", checkpoint, text, tmp_path), "--model.gradient_checkpointing", "true"]
    die(run, args, where, call)
    on, stock = [], MoECausalLM.training_step

    def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        on.append(module.network.is_gradient_checkpointing)
        return stock(module, batch, batch_idx)

    monkeypatch.setattr(MoECausalLM, "training_step", step)
    run.ok(*args)
    assert on and all(on)


# ------------------------------------------------------------------------------------------------- processes


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
