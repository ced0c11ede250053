"""Fits of so many steps inside a command, on the command's own Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moe.cli.step_saves import StepSaves, step_of
from lightning_moe.data.datamodule import TextDataModule


def fit_steps(
    trainer: Trainer,
    module: LightningModule,
    data: TextDataModule,
    steps: int,
    batches: int,
    saves: StepSaves,
    what: str,
    callbacks: Sequence[Callback] = (),
    clip: float | None = None,
) -> int:
    """Fit ``module`` on ``data`` for ``steps`` optimiser steps of ``batches`` batches each.

    It goes on from the newest of ``saves``; ``what`` is what people call a step of it. ``clip`` is the largest norm of
    the gradients where the Trainer has none set. The Trainer's own loop and settings are put back afterwards. Returns
    the steps that were made: a callback may stop it early.
    """
    data.setup("fit")
    per_epoch = len(data.text) // (data.batch_size * trainer.world_size)
    settings: dict[str, Any] = {"log_every_n_steps": 1}
    if module.automatic_optimization:
        # Lightning steps at the end of each epoch, whether the last step is complete or not.
        epochs = -(-steps // max(-(-per_epoch // batches), 1))
        settings["accumulate_grad_batches"] = batches
        if trainer.gradient_clip_val is None:
            settings["gradient_clip_val"] = clip
    else:
        epochs = -(-steps * batches // max(per_epoch, 1))
    last = saves.newest
    if last is not None and trainer.is_global_zero:
        print(f"Going on from {what} {step_of(last)} of an earlier run.")
    with _own_loop(trainer, [*callbacks, saves], steps, epochs, settings):
        trainer.fit(module, datamodule=data, ckpt_path=None if last is None else str(last))
        return trainer.global_step


@contextmanager
def _own_loop(
    trainer: Any, callbacks: Sequence[Callback], steps: int, epochs: int, settings: dict[str, Any]
) -> Iterator[None]:
    kept = {name: getattr(trainer, name) for name in ("callbacks", "fit_loop", *settings)}
    trainer.callbacks = [*trainer.callbacks, *callbacks]
    trainer.fit_loop = type(trainer.fit_loop)(trainer, max_epochs=epochs)
    trainer.fit_loop.epoch_loop = type(trainer.fit_loop.epoch_loop)(trainer, max_steps=steps)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.should_stop = False
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        trainer.should_stop = False
        _let_go(trainer)


def _let_go(trainer: Any) -> None:
    """Lightning keeps the last fit's module, optimisers and their state until the next one begins."""
    strategy = trainer.strategy
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    strategy._model = strategy._lightning_module = None
    trainer._data_connector._datahook_selector = None
