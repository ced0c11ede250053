"""How often a model skipped experts during a validation loop."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.moe.skip_tables import count_only, reset_skipped, skipped


class SkipCount(Callback):
    """Count the assignments of real tokens that a model skips; batches are mappings with ``attention_mask``."""

    def __init__(self) -> None:
        self.fractions: dict[str, float] = {}
        """Skipped of all assignments, overall under ``all`` and of each layer that skips, over all ranks."""

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reset_skipped(hugging_face_model(pl_module, "SkipCount"))

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        count_only(hugging_face_model(pl_module, "SkipCount"), batch["attention_mask"])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, "SkipCount")
        count_only(model, None)
        layers = skipped(model)
        counts = torch.tensor([*layers.values(), (0, 0)], dtype=torch.float64, device=pl_module.device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        counts[-1] = counts.sum(0)
        self.fractions = {
            name: round(one / total, 6) if total else 0.0
            for name, (one, total) in zip((*layers, "all"), counts.tolist(), strict=True)
        }
