"""Padded text, a model and a Trainer for callbacks that watch or rebalance routers, and what such guests may leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.helpers.families import VOCAB

LENGTH = 12
STEPS = 4


class Windows(Dataset[dict[str, Tensor]]):
    """8 sequences; the odd ones end in padding, unless there is no mask at all."""

    def __init__(self, masked: bool = True, seed: int = 0) -> None:
        self.ids = torch.randint(3, VOCAB, (2 * STEPS, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(LENGTH, dtype=torch.long)
        if index % 2:
            mask[-5:] = 0
        item = {"input_ids": self.ids[index]}
        return item | {"attention_mask": mask} if self.masked else item


def loader(masked: bool = True, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    """4 batches of 2."""
    return DataLoader(Windows(masked, seed), batch_size=2)


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "devices": 1, "logger": False, "enable_checkpointing": False} | kwargs
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )


def traces(module: Any) -> dict[str, Any]:
    """Everything a guest could have left behind."""
    return {
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        },
        "attributes": {name: sorted(part.__dict__) for name, part in module.wrapped.named_modules()},
        "learns": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
    }
