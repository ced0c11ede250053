"""Killed rounds go on: the same plan, records and weights, and no finished step is done twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.killed_rounds import (
    KD_STEP,
    STEP,
    SURGERY,
    Killed,
    Whole,
    Work,
    args_of,
    assert_ends_alike,
    die,
    go_on,
    kill,
    often,
    whole_runs,
)
from tests.helpers.checkpoint import Commands
from tests.helpers.thinning import thinned

OBSERVE = "lightning_moe.callbacks.expert_observation:ExpertObservation._next_batch"
MEASURE = "lightning_moe.modules.causal_lm:MoECausalLM.validation_step"
ANSWER = "lightning_moe.cli.teacher:AnswerPass.predict_step"
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


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at each step of tuning; short searches; no pictures."""
    often(monkeypatch)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_runs(checkpoint, text, tmp_path_factory)


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
