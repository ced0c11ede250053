"""StepSaves: saves of a fit at ends of steps, so that a killed fit goes on as if nothing had happened."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_moe.files import put_in_place, remove


class StepSaves(Checkpoint):
    """Keep the newest save of a fit in a folder, written beside first and then renamed.

    Never in the midst of accumulating gradients, which no save holds. Like every ``Checkpoint`` it comes after the
    other callbacks of a batch.

    Args:
        folder: Of this fit alone.
        every_steps: Optimiser steps between two saves.
        every_seconds: Seconds between two saves, besides.
    """

    def __init__(self, folder: Path, every_steps: int = 1, every_seconds: float = 0.0) -> None:
        self.folder, self.every_steps, self.every_seconds = folder, every_steps, every_seconds
        self._step, self._time = 0, 0.0

    @property
    def newest(self) -> Path | None:
        return max(self.folder.glob("step-*.ckpt"), key=step_of, default=None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self._step:
            return  # accumulating
        self._step = trainer.global_step
        due = self._step % self.every_steps == 0 and time.monotonic() - self._time >= self.every_seconds
        if not trainer.strategy.broadcast(due):
            return
        file = self.folder / f"step-{self._step}.ckpt"
        beside = file.with_suffix(".partial")
        if trainer.is_global_zero:
            remove(beside)  # of a save that was killed
        trainer.strategy.barrier()
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            put_in_place(beside, file)
            for old in self.folder.glob("step-*.ckpt"):
                if old != file:
                    remove(old)
        trainer.strategy.barrier()
        self._time = time.monotonic()


def step_of(file: Path) -> int:
    number = re.search(r"step-(\d+)", file.name)
    assert number is not None
    return int(number[1])
