"""ExpertPruning in a fit that is killed: it goes on, in a new process as it were, to the same end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.callbacks import ExpertPruning, HFCheckpoint, RouterRebalance
from lightning_moe.errors import InputError
from tests.callbacks.foreign_fit import (
    TOKENS,
    ByNumber,
    Killed,
    calibration,
    counts,
    fit,
    loader,
    small_model,
    steps_of,
)


def module(kill_at: int | None = None) -> ByNumber:
    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    return ByNumber(small_model(), lambda p: torch.optim.AdamW(p, lr=1e-2), schedule, kill_at=kill_at)


def saver(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    settings: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"} | kwargs
    return ModelCheckpoint(folder, **settings)


def records_of(pruning: ExpertPruning) -> list[Any]:
    return [replace(record, seconds={}) for record in pruning.records]


def assert_same_end(one: tuple[Any, ExpertPruning], other: tuple[Any, ExpertPruning]) -> None:
    assert other[1].keep == one[1].keep
    assert records_of(other[1]) == records_of(one[1])
    assert other[1].tokens == one[1].tokens
    left, right = one[0].inner.state_dict(), other[0].inner.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


SETTINGS: dict[str, dict[str, Any]] = {
    "reset": {"start": 2, "every": 3},
    "carry": {"start": 2, "every": 3, "optimizer": "carry", "scope": "global"},
    "cosine": {"start": 2, "every": 3, "optimizer": "carry", "cosine": True},
    "from the start": {"every": 4},
    "from the start, cosine": {"every": 4, "cosine": True},
    "tokens": {"unit": "tokens", "at": [30, 100], "optimizer": "carry", "cosine": True},
    "random": {"start": 2, "every": 3, "method": "random", "seed": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_killed_fit_goes_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    """From every step: before the first round, right after one, between two, and after the last."""

    def pruning(name: str) -> ExpertPruning:
        arguments = {"method": "ean", "evaluation": loader(1, seed=9), "folder": tmp_path / name} | settings
        return ExpertPruning(calibration(), 0.5, [0.25, 0.5], **arguments)

    whole = module(), pruning("whole")
    fit(whole[0], tmp_path, whole[1], data=loader(7))
    assert len(whole[1].records) == 2
    killed = pruning("killed")
    with pytest.raises(Killed):
        fit(module(kill_at=6), tmp_path, killed, saver(tmp_path / "saved"), data=loader(7))
    for step in range(1, 7):
        second = module(), pruning(f"from {step}")
        fit(second[0], tmp_path, second[1], data=loader(7), ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert_same_end(whole, second)
        assert len((tmp_path / f"from {step}" / "rounds.jsonl").read_text().splitlines()) == 2


EPOCH_SAVES: dict[str, dict[str, Any]] = {
    "after training": {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": False},
    "after the last batch": {},
}


@pytest.mark.parametrize("saves", EPOCH_SAVES.values(), ids=EPOCH_SAVES)
@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_a_fit_by_epochs_goes_on(tmp_path: Path, optimizer: Any, saves: dict[str, Any]) -> None:
    """Also from a checkpoint that Lightning writes before an epoch's end, which it then leaves out."""

    class Validated(ByNumber):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    def pruning() -> ExpertPruning:
        return ExpertPruning(
            calibration(), 0.5, [0.25, 0.5], "ean", unit="epochs", start=1, every=2, optimizer=optimizer
        )

    def new(kill_at: int | None = None) -> Validated:
        return Validated(small_model(), lambda p: torch.optim.AdamW(p, lr=1e-2), kill_at=kill_at)

    data: dict[str, Any] = {"data": loader(2), "val": loader(1), "max_epochs": 5}
    whole = new(), pruning()
    fit(whole[0], tmp_path, whole[1], **data)
    assert steps_of(whole[1]) == [2, 6]
    with pytest.raises(Killed):
        fit(new(kill_at=9), tmp_path, pruning(), saver(tmp_path / "saved", **saves), **data)
    for step in (2, 4, 6, 8):
        second = new(), pruning()
        fit(second[0], tmp_path, second[1], ckpt_path=tmp_path / "saved" / f"step={step}.ckpt", **data)
        assert_same_end(whole, second)


def test_gradients_are_accumulated(tmp_path: Path) -> None:
    def pruning() -> ExpertPruning:
        return ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", unit="tokens", at=[1, 60], optimizer="carry")

    whole = module(), pruning()
    fit(whole[0], tmp_path, whole[1], data=loader(7), accumulate_grad_batches=2)
    assert steps_of(whole[1]) == [1, 2]
    with pytest.raises(Killed):
        fit(module(5), tmp_path, pruning(), saver(tmp_path / "saved"), data=loader(7), accumulate_grad_batches=2)
    for step in (1, 2):
        second = module(), pruning()
        file = tmp_path / "saved" / f"step={step}.ckpt"
        fit(second[0], tmp_path, second[1], data=loader(7), accumulate_grad_batches=2, ckpt_path=file)
        assert_same_end(whole, second)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_other_guests_go_on_too(tmp_path: Path, family: str) -> None:
    def guests() -> list[Any]:
        return [
            RouterRebalance(z_loss=0.1, bias_step=0.01),
            ExpertPruning(calibration(), 0.5, [0.25, 0.5], "reap", start=1, every=2, optimizer="carry"),
            HFCheckpoint(),
        ]

    def new(kill_at: int | None = None) -> ByNumber:
        return ByNumber(small_model(family), lambda p: torch.optim.AdamW(p, lr=1e-2), kill_at=kill_at)

    whole, mine = new(), guests()
    fit(whole, tmp_path, *mine)
    with pytest.raises(Killed):
        fit(new(5), tmp_path, *guests(), saver(tmp_path / "saved"))
    for step in (1, 4):
        second, others = new(), guests()
        fit(second, tmp_path, *others, ckpt_path=tmp_path / "saved" / f"step={step}.ckpt")
        assert_same_end((whole, mine[1]), (second, others[1]))


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
@pytest.mark.parametrize("start", [0, 5])
def test_a_fit_without_it_goes_on_with_it(tmp_path: Path, start: int, optimizer: Any) -> None:
    """The first rounds that are due happen where that fit goes on, on its weights and what its optimiser knows."""
    fit(module(), tmp_path, saver(tmp_path / "saved"), data=loader(7), max_steps=4)
    second = module()
    pruning = ExpertPruning(calibration(), 0.5, method="ean", start=start, optimizer=optimizer)
    fit(second, tmp_path, pruning, data=loader(7), ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert counts(second.inner) == [4, 4]
    assert len(pruning.records) == 1
    assert pruning.records[0].steps == 7 - max(start, 4)


def test_a_second_fit_of_the_same_model_goes_on(tmp_path: Path) -> None:
    """Nothing is pruned twice."""
    own = module()
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", start=1, every=2)
    fit(own, tmp_path, pruning, data=loader(7), max_steps=2)
    assert counts(own.inner) == [6, 6]
    first = records_of(pruning)[0]
    fit(own, tmp_path, pruning, data=loader(7), max_steps=4)
    assert counts(own.inner) == [4, 4]
    assert pruning.records[0].keep == first.keep
    assert all(record.steps >= 0 for record in pruning.records)


def test_another_model_is_no_continuation(tmp_path: Path) -> None:
    """A callback that has pruned one model does not take the next one for pruned."""
    pruning = ExpertPruning(calibration(), 0.5, method="ean")
    fit(module(), tmp_path, pruning, max_steps=1)
    second = module()
    try:
        fit(second, tmp_path, pruning, max_steps=1)
    except InputError as error:
        assert "\n" not in str(error)  # to refuse is as good
    else:
        assert counts(second.inner) == [4, 4]


def test_steps_count_over_several_fits(tmp_path: Path) -> None:
    """As tokens do: each Trainer counts from 0 again; and the second fit goes on from its checkpoints, too."""
    own = module()
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", at=[2, 9])
    fit(own, tmp_path, pruning, data=loader(6))
    assert [record.steps for record in pruning.records] == [4]
    fit(own, tmp_path, pruning, saver(tmp_path / "saved"), data=loader(3))
    assert [record.steps for record in pruning.records] == [7]
    again = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", at=[2, 9])
    fit(module(), tmp_path, again, data=loader(3), ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert records_of(again) == records_of(pruning)
    assert again.records[0].tokens == 7 * TOKENS


class SavesEarly(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "early.ckpt")


def test_a_checkpoint_of_before_the_first_look_at_the_model(tmp_path: Path) -> None:
    """It knows no layers and no rounds; the fit that goes on from it is a whole one."""
    whole, again = (ExpertPruning(calibration(), 0.5, method="ean", start=2) for _ in range(2))
    fit(module(), tmp_path, SavesEarly(), whole)
    fit(module(), tmp_path, again, ckpt_path=tmp_path / "early.ckpt")
    assert again.keep == whole.keep and len(again.records) == 1


def test_a_checkpoint_of_before_steps_were_counted_over_fits(tmp_path: Path) -> None:
    whole, again = (ExpertPruning(calibration(), 0.5, method="ean", start=2) for _ in range(2))
    fit(module(), tmp_path, whole, saver(tmp_path))
    file = tmp_path / "step=4.ckpt"
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["callbacks"][whole.state_key]["step_at_round"]
    torch.save(checkpoint, file)
    fit(module(), tmp_path, again, ckpt_path=file)
    assert records_of(again) == records_of(whole)


@pytest.mark.parametrize("other", [{"method": "reap"}, {"ratio": 0.25}], ids=["method", "ratio"])
def test_going_on_with_other_rounds_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """The model of the checkpoint is cut, and would be taken for a whole one."""
    settings: dict[str, Any] = {"ratio": 0.5, "method": "ean"}
    fit(module(), tmp_path, ExpertPruning(calibration(), **settings), saver(tmp_path))
    with pytest.raises(InputError, match=r"checkpoint is of ExpertPruning.*'ean'.*0\.5") as caught:
        fit(module(), tmp_path, ExpertPruning(calibration(), **settings | other), ckpt_path=tmp_path / "step=4.ckpt")
    assert "\n" not in str(caught.value)


def test_a_line_for_each_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", start=1, every=2, evaluation=loader(1, seed=9))
    fit(module(), tmp_path, pruning)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ExpertPruning: round ")]
    assert len(lines) == 2 and lines[1].startswith("ExpertPruning: round 2 of 2 at step 3: experts 8, ratio 0.5, ")
