"""HFCheckpoint: a Hugging Face folder of the model, written when a fit ends."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_tokenizer, save_model
from lightning_moe.moe.layers import hugging_face_model


class HFCheckpoint(Callback):
    """Export the Hugging Face model inside any LightningModule when a fit ends.

    Args:
        folder: Where to write; replaced as a whole by each export.
        tokenizer: Folder or hub id whose tokenizer travels along.
        dtype: Of the saved weights, such as ``bfloat16``; null keeps that of training.
    """

    def __init__(self, folder: str, tokenizer: str | None = None, dtype: str | None = None) -> None:
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"HFCheckpoint: dtype {dtype!r} is none of torch's, such as 'bfloat16'.")
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.tokenizer is not None and stage == "fit":
            load_tokenizer(self.tokenizer)  # a wrong path is told before the training, not after

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hugging_face_model(pl_module, "HFCheckpoint")  # likewise

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            model = hugging_face_model(pl_module, "HFCheckpoint")
            save_model(model, Path(self.folder), self.tokenizer, self.dtype)
            print(f"The model is in {self.folder}.")
