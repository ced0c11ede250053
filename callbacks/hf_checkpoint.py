"""HFCheckpoint: Hugging Face folders of the model, beside Lightning's checkpoints and at the end of a fit."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.errors import InputError
from lightning_moe.files import clear_partial, remove, write_json
from lightning_moe.moe.checkpoints import load_tokenizer
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.moe.ranks import on_all_ranks

SUFFIX = "-hf"
"""What the folder beside ``NAME.ckpt`` is called more than ``NAME``."""
RECORD = "of_checkpoint.json"
"""In such a folder: the checkpoint that it is of."""
EDGE = 2**20
"""Bytes at either end of a checkpoint's files that tell it from others."""


class HFCheckpoint(Callback):
    """Export the Hugging Face model inside any LightningModule.

    Beside each checkpoint ``NAME.ckpt`` that Lightning writes, ``NAME-hf`` holds the model of that moment, and goes
    when the checkpoint goes.

    A kill may come between a checkpoint and its export. The fit that goes on from one of its own checkpoints makes that
    one's export if it is missing or of other weights, removes the exports of others that hold other weights, and warns
    of checkpoints without an export and of exports without a checkpoint.

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
        self._settled = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tokenizer is not None and stage == "fit":
            load_tokenizer(self.tokenizer)  # a wrong path is told before the training, not after

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hugging_face_model(pl_module, "HFCheckpoint")  # likewise
        self._known, self._saved, self._settled = self._checkpoints(trainer), [], False

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
        due = [file for file, written in found.items() if self._known.get(file) != written]
        if not self._settled:
            # Not in on_train_start: there is none where no step is left, and other callbacks restore the model in it.
            self._settled = True
            due += self._settle(trainer, found, due)
        for file in due:
            self._export(pl_module, _beside(file))
            if trainer.is_global_zero:
                write_json(_beside(file) / RECORD, _record(file))
        if trainer.is_global_zero:
            for file in self._known.keys() - found.keys():
                _discard(_beside(file))
        self._known = found

    def _settle(self, trainer: Trainer, found: Collection[Path], due: Collection[Path]) -> list[Path]:
        """See to what a kill left, and say which checkpoints get their export from the model in memory."""
        mine = on_all_ranks(lambda: self._settled_here(trainer, found, due) if trainer.is_global_zero else [])
        return trainer.strategy.broadcast(mine)

    def _settled_here(self, trainer: Trainer, found: Collection[Path], due: Collection[Path]) -> list[Path]:
        begun = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        own = [file for file in found if file.resolve() == begun]
        if not own:
            return []
        missing, lone = [], []
        for file in found:
            export = _beside(file)
            clear_partial(export)
            if file not in own and file not in due:
                if (export / RECORD).exists() and not _is_exported(file):
                    _discard(export)
                if not export.exists():
                    missing.append(file.name)
        for export in {export for folder in _folders(trainer) for export in folder.rglob(f"*{SUFFIX}")}:
            file = export.with_name(export.name.removesuffix(SUFFIX) + ".ckpt")
            if not file.exists() and _read_record(export).get("checkpoint") == file.name:
                lone.append(export.name)
        if missing:
            rank_zero_warn(
                f"HFCheckpoint: no export of {', '.join(missing)}, whose model is not in memory; a fit that goes on "
                "from such a checkpoint makes its export."
            )
        if lone:
            rank_zero_warn(
                f"HFCheckpoint: beside no checkpoint any more: {', '.join(sorted(lone))}; remove what you do not want."
            )
        return [file for file in own if file not in due and not _is_exported(file)]

    def _export(self, pl_module: LightningModule, folder: Path) -> None:
        export_model(hugging_face_model(pl_module, "HFCheckpoint"), folder, self.tokenizer, self.dtype)

    def _checkpoints(self, trainer: Trainer) -> dict[Path, int]:
        """What lies in the folders of the Trainer's checkpoint callbacks, and when it was written.

        As rank 0 sees it, which also removes them: all must export the same ones.
        """
        found: dict[Path, int] = {}
        if trainer.is_global_zero:
            files = sorted({file for folder in _folders(trainer) for file in folder.rglob("*.ckpt")})
            found = {file: file.stat().st_mtime_ns for file in files}
        return trainer.strategy.broadcast(found)


def _beside(file: Path) -> Path:
    return file.with_name(file.stem + SUFFIX)


def _folders(trainer: Trainer) -> set[Path]:
    found = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
    return {Path(folder) for folder in found if folder}


def _record(file: Path) -> dict[str, Any]:
    return {"checkpoint": file.name, "identity": checkpoint_identity(file)}


def _read_record(export: Path) -> dict[str, Any]:
    """Empty where there is no record, as in a folder that somebody else made."""
    with suppress(OSError, ValueError):
        record: Any = json.loads((export / RECORD).read_text())
        return record if isinstance(record, dict) else {}
    return {}


def _is_exported(file: Path) -> bool:
    return _read_record(_beside(file)) == _record(file)


def _discard(export: Path) -> None:
    if not export.is_symlink():  # we make none
        remove(export)


def checkpoint_identity(checkpoint: Path) -> str:
    """The same for a copy, another for other weights, of a file or a folder, without reading gigabytes.

    A file that torch wrote begins with the step and all that is no tensor, and ends with a checksum of each tensor.
    """
    digest = sha256()
    for file in sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(checkpoint)} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(EDGE))
                stream.seek(max(size - EDGE, 0))
                digest.update(stream.read())
    return digest.hexdigest()
