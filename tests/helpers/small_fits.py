"""A quiet Trainer, text of a few windows and modules that are ready: for fits of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM


def trainer(folder: Path, *callbacks: Callback, checkpoints: bool = False, **kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoints,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )


def training_text(checkpoint: Path, text: Path, **kwargs: Any) -> TextDataModule:
    """9 windows: 3 batches an epoch."""
    settings = {"seq_len": 16, "samples": 9, "batch_size": 3} | kwargs
    return TextDataModule(str(text), tokenizer=str(checkpoint), **settings)


def batch_of(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def made(module: MoECausalLM) -> MoECausalLM:
    module.configure_model()
    return module
