"""HFCheckpoint: Hugging Face folders of the model, beside Lightning's checkpoints and at the end of a fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_tokenizer
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import hugging_face_model

SUFFIX = "-hf"
"""What the folder beside ``NAME.ckpt`` is called more than ``NAME``."""


class HFCheckpoint(Callback):
    """Export the Hugging Face model inside any LightningModule.

    Beside each checkpoint ``NAME.ckpt`` that Lightning writes, ``NAME-hf`` holds the model of that moment, and goes
    when the checkpoint goes.

    Args:
        folder: Where the model goes when a fit ends, besides; replaced as a whole by each export.
        tokenizer: Folder or hub id whose tokenizer travels along.
        dtype: Of the saved weights, such as ``bfloat16``; null keeps that of training.
        beside_checkpoints: Whether to export beside checkpoints; default unless there is a ``folder``.
    """

    def __init__(
        self,
        folder: str | None = None,
        tokenizer: str | None = None,
        dtype: str | None = None,
        beside_checkpoints: bool | None = None,
    ) -> None:
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"HFCheckpoint: dtype {dtype!r} is none of torch's, such as 'bfloat16'.")
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.beside_checkpoints = folder is None if beside_checkpoints is None else beside_checkpoints
        if folder is None and not self.beside_checkpoints:
            raise InputError("HFCheckpoint: nothing to export: give a folder, or leave out beside_checkpoints.")
        self._saved: list[int | None] = []
        self._known: dict[Path, int] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tokenizer is not None and stage == "fit":
            load_tokenizer(self.tokenizer)  # a wrong path is told before the training, not after

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hugging_face_model(pl_module, "HFCheckpoint")  # likewise
        self._known = self._checkpoints(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint that a killed fit had no time to export is exported when the next one goes on from it."""
        begun = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        ours = {file.resolve() for file in self._known}
        missing = begun in ours and begun is not None and not _beside(begun).is_dir()
        if self.beside_checkpoints and trainer.strategy.broadcast(missing):
            assert begun is not None
            self._export(pl_module, _beside(begun))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.follow(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.follow(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.follow(trainer, pl_module)
        if self.folder is not None:
            self._export(pl_module, Path(self.folder))
            if trainer.is_global_zero:
                print(f"The model is in {self.folder}.")

    def follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export beside new checkpoints, remove what lies beside those that are gone."""
        # Not by on_save_checkpoint, which Lightning leaves out where only weights are saved.
        # Of savers that do not say when they saved last, it looks at every step.
        saved = [
            getattr(saver, "_last_global_step_saved", trainer.global_step) for saver in trainer.checkpoint_callbacks
        ]
        if not self.beside_checkpoints or saved == self._saved:
            return
        self._saved = saved
        found = self._checkpoints(trainer)
        for file, written in found.items():
            if self._known.get(file) != written:
                self._export(pl_module, _beside(file))
        if trainer.is_global_zero:
            for file in self._known.keys() - found.keys():
                shutil.rmtree(_beside(file), ignore_errors=True)
        self._known = found

    def _export(self, pl_module: LightningModule, folder: Path) -> None:
        export_model(hugging_face_model(pl_module, "HFCheckpoint"), folder, self.tokenizer, self.dtype)

    def _checkpoints(self, trainer: Trainer) -> dict[Path, int]:
        """What lies in the folders of the Trainer's checkpoint callbacks, and when it was written.

        As rank 0 sees it, which also removes them: all must export the same ones.
        """
        found: dict[Path, int] = {}
        if trainer.is_global_zero:
            folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
            files = sorted(file for folder in folders if folder for file in Path(folder).rglob("*.ckpt"))
            found = {file: file.stat().st_mtime_ns for file in files}
        return trainer.strategy.broadcast(found)


def _beside(file: Path) -> Path:
    return file.with_name(file.stem + SUFFIX)
