"""A pass over the calibration text, with a callback that watches it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from lightning_moe.callbacks.guests import guests
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM


def watch_text(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, watcher: Callback, partial: Path | None = None
) -> None:
    """Predict on the text while ``watcher`` is among the trainer's callbacks.

    ``partial`` is where the watcher saves; one who stops the pass is told when that holds something.
    """
    try:
        with guests(trainer, watcher):
            trainer.predict(model, datamodule=data, return_predictions=False)
    except (KeyboardInterrupt, SystemExit):
        if partial is not None and any(partial.glob("*")) and trainer.is_global_zero:
            print("Stopped; the same command goes on from the last save.", file=sys.stderr)
        raise


def start_at(trainer: Trainer, data: TextDataModule) -> Callable[[int], None]:
    """What a watcher calls with the number of batches that an earlier pass has done: the next leaves them out."""

    def start(batch: int) -> None:
        data.start_batch = batch
        if batch and trainer.is_global_zero:
            print(f"Going on from batch {batch} of an earlier pass.")

    return start
