"""MoETrainer: Lightning's Trainer; each of its methods is a command."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


class MoETrainer(Trainer):
    """A Trainer whose loaders already know their rank, so that Lightning replaces no sampler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, use_distributed_sampler=False, **kwargs)
