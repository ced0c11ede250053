"""HFCheckpoint after a kill: the fit that goes on leaves no export of other weights, nor one of no checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.callbacks import hf_checkpoint
from lightning_moe.callbacks.expert_pruning import ExpertPruning
from lightning_moe.callbacks.hf_checkpoint import RECORD, HFCheckpoint, checkpoint_identity
from tests.callbacks.export_fit import Validated, assert_beside, fit_saving
from tests.callbacks.foreign_fit import Killed, calibration, small_model


def test_a_killed_fit_goes_on_exporting(tmp_path: Path) -> None:
    """What an earlier run has written is left as it is, and goes with its checkpoint all the same."""

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", "{epoch}", monitor="val", mode="max", save_top_k=2, save_last=True)

    first = Validated(small_model(), kill_at=5)
    with pytest.raises(Killed):
        fit_saving(tmp_path, HFCheckpoint(), saving(), module=first, max_epochs=4, batches=2)
    assert_beside(tmp_path / "saved", "epoch=0", "epoch=1", "last")
    written = (tmp_path / "saved" / "epoch=1-hf" / "model.safetensors").stat().st_mtime_ns
    fit_saving(tmp_path, HFCheckpoint(), saving(), max_epochs=3, batches=2, ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert (tmp_path / "saved" / "epoch=1-hf" / "model.safetensors").stat().st_mtime_ns == written
    assert_beside(tmp_path / "saved", "epoch=1", "epoch=2", "last")


@pytest.mark.parametrize("spelling", ["absolute", "relative", "last"])
def test_an_export_that_a_kill_left_out_is_made_when_a_fit_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """Of the weights that were saved, before training moves them, however the checkpoint is named."""

    last = spelling == "last"

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=last)

    fit_saving(tmp_path, HFCheckpoint(), saving(), max_steps=2)
    file = tmp_path / "saved" / ("last.ckpt" if last else "step=2.ckpt")
    export = file.with_name(f"{file.stem}-hf")
    shutil.rmtree(export)
    found: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            found.append((export / "model.safetensors").is_file())

    monkeypatch.chdir(tmp_path)
    begun = {"absolute": file, "relative": file.relative_to(tmp_path), "last": "last"}
    fit_saving(tmp_path, HFCheckpoint(), saving(), Look(), ckpt_path=begun[spelling])
    assert found == [True, True]
    assert_beside(tmp_path / "saved", "step=2", "step=4", *(["last"] if last else []))


# ------------------------------------------------------------------------------------------ whenever it comes


def newest_and_last(folder: Path) -> ModelCheckpoint:
    """Every second step; what was the newest before goes."""
    return ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_last=True)


class Kills:
    """Raises after the call numbered ``at`` of all that writes or removes a checkpoint or an export."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.done, self.at = 0, at
        for owner, names in (
            (ModelCheckpoint, ("_save_checkpoint", "_save_last_checkpoint", "_remove_checkpoint")),
            (hf_checkpoint, ("export_model", "write_json", "_discard")),
        ):
            for name in names:
                patch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def call_and_raise(*args: Any, **kwargs: Any) -> None:
            call(*args, **kwargs)
            self.done += 1
            if self.done == self.at:
                raise Killed

        return call_and_raise


def killed_fits(folder: Path) -> Iterator[Path]:
    """The folder of a fit of four steps, killed at one moment after another."""
    for moment in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            Kills(patch, moment)
            try:
                fit_saving(folder / str(moment), HFCheckpoint(), newest_and_last(folder / str(moment)))
            except Killed:
                yield folder / str(moment)
            else:
                return


@pytest.mark.parametrize("steps", [4, 5], ids=["no step left", "a step left"])
def test_whenever_the_kill_comes(tmp_path: Path, steps: int) -> None:
    """Each checkpoint has its own weights beside it, or is said to have none; the one gone on from has them."""
    said = 0
    for folder in killed_fits(tmp_path):
        saved = folder / "saved"
        if not (saved / "last.ckpt").exists():
            continue
        (saved / ".last-hf.partial").mkdir()  # which an exception, unlike a kill, removes
        with pytest.warns(UserWarning) as warned:
            saver = ModelCheckpoint(saved, "{step}", every_n_train_steps=100)
            fit_saving(folder, HFCheckpoint(), saver, ckpt_path=saved / "last.ckpt", max_steps=steps)
        lone = [file for file in saved.glob("*.ckpt") if not file.with_name(f"{file.stem}-hf").exists()]
        expected = f"HFCheckpoint: no export of {', '.join(file.name for file in lone)}, whose model is not in memory"
        said += len(lone)
        assert any(expected in str(one.message) for one in warned) == bool(lone)
        assert saved / "last.ckpt" not in lone
        for file in lone:
            file.unlink()
        orphans = [export for export in saved.glob("*-hf") if not (saved / f"{export.name[:-3]}.ckpt").exists()]
        expected = f"beside no checkpoint any more: {', '.join(export.name for export in orphans)};"
        assert any(expected in str(one.message) for one in warned) == bool(orphans)
        for export in orphans:  # it is for people to say whether they want it
            shutil.rmtree(export)
        assert_beside(saved, *(file.stem for file in saved.glob("*.ckpt")))
    assert said


def test_gone_on_from_the_other_checkpoint(tmp_path: Path) -> None:
    """An export of older weights does not stay beside a newer checkpoint whose model nobody has; gone on from that
    one, it is made."""
    saved = tmp_path / "saved"
    fit_saving(tmp_path, HFCheckpoint(), newest_and_last(tmp_path), max_steps=2)
    fit_saving(tmp_path, newest_and_last(tmp_path), ckpt_path=saved / "last.ckpt")
    assert sorted(file.name for file in saved.iterdir()) == ["last-hf", "last.ckpt", "step=2-hf", "step=4.ckpt"]
    for begun, left in (("step=4", ["step=2", "step=4"]), ("last", ["last", "step=2", "step=4"])):
        fit_saving(tmp_path, HFCheckpoint(), newest_and_last(tmp_path), ckpt_path=saved / f"{begun}.ckpt", max_steps=4)
        assert sorted(export.name for export in saved.glob("*-hf")) == [f"{name}-hf" for name in left]
    shutil.rmtree(saved / "step=2-hf")  # somebody may want it, though its checkpoint is gone
    assert_beside(saved, "last", "step=4")


def test_made_before_a_round_that_is_due_at_once(tmp_path: Path) -> None:
    fit_saving(tmp_path, newest_and_last(tmp_path), max_steps=2)
    begun = tmp_path / "saved" / "last.ckpt"
    callbacks = ExpertPruning(calibration(), 0.5, method="rwn"), HFCheckpoint(), ModelCheckpoint(begun.parent, "{step}")
    fit_saving(tmp_path, *callbacks, ckpt_path=begun, max_steps=3)
    (tmp_path / "saved" / "step=2.ckpt").unlink()
    assert_beside(tmp_path / "saved", "last", "step=3")


# ------------------------------------------------------------------------------------------ what is left alone


def test_a_copy_of_a_run_goes_on_as_the_run_would(tmp_path: Path) -> None:
    """Nothing in it is written again or removed, whatever the times of its files."""
    saver = ModelCheckpoint(tmp_path / "run" / "saved", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    fit_saving(tmp_path / "run", HFCheckpoint(), saver)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    saved = tmp_path / "copy" / "saved"
    before = {file: file.stat().st_mtime_ns for file in saved.rglob("*")}
    saver = ModelCheckpoint(saved, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    fit_saving(tmp_path / "copy", HFCheckpoint(), saver, ckpt_path=saved / "last.ckpt", max_steps=4)
    assert {file: file.stat().st_mtime_ns for file in saved.rglob("*")} == before
    assert_beside(saved, "step=2", "step=4", "last")


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    """An export under another name, one without a record, and anything else that is called like one."""
    saved = tmp_path / "saved"
    fit_saving(tmp_path, HFCheckpoint(), newest_and_last(tmp_path), max_steps=2)
    shutil.copytree(saved / "last-hf", saved / "mine-hf")
    shutil.copytree(saved / "last-hf", saved / "older-hf")
    (saved / "older-hf" / RECORD).unlink()
    (saved / "theirs-hf").mkdir()
    (saved / "linked-hf").symlink_to("mine-hf")
    shutil.copyfile(saved / "last.ckpt", saved / "older.ckpt")
    before = sorted(saved.rglob("*"))
    fit_saving(tmp_path, HFCheckpoint(), newest_and_last(tmp_path), ckpt_path=saved / "last.ckpt", max_steps=2)
    assert sorted(saved.rglob("*")) == before


def test_a_new_fit_leaves_what_an_earlier_one_made(tmp_path: Path) -> None:
    """Somebody may have removed the checkpoints and kept the exports."""
    fit_saving(tmp_path, HFCheckpoint(), newest_and_last(tmp_path), max_steps=2)
    (tmp_path / "saved" / "step=2.ckpt").unlink()
    fit_saving(tmp_path, HFCheckpoint(), ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3))
    assert {"step=2-hf", "step=3-hf", "last-hf"} <= {entry.name for entry in (tmp_path / "saved").iterdir()}


@pytest.mark.parametrize("split", [False, True], ids=["file", "folder"])
def test_the_identity_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    """A copy has it too; the step or any tensor, however deep inside a file, makes another."""
    monkeypatch.setattr(hf_checkpoint, "EDGE", 4096)

    def identity(name: str, step: int, changed: int | None) -> str:
        weights = [torch.zeros(20_000) for _ in range(5)]
        if changed is not None:
            weights[changed][10_000] = 1.0
        target = tmp_path / name
        if split:
            target.mkdir()
        torch.save({"step": step, "weights": weights}, target / "part" if split else target)
        return checkpoint_identity(target)

    first = identity("first", 4, None)
    (shutil.copytree if split else shutil.copyfile)(tmp_path / "first", tmp_path / "copy")
    assert checkpoint_identity(tmp_path / "copy") == first
    others = [identity(f"changed-{number}", 4, number) for number in range(5)]
    assert len({first, *others, identity("step", 5, None)}) == 7
