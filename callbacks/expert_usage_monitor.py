"""ExpertUsageMonitor: how evenly each router spreads its tokens, before and after, in the logger and on disk."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks.batches import batch_mask
from lightning_moe.callbacks.figure_logging import log_figure, save_figure
from lightning_moe.errors import InputError
from lightning_moe.files import replaced_file
from lightning_moe.moe.layers import hugging_face_model
from lightning_moe.stats.usage import FIGURES, RouterCounts, load_figures, mean_load

Counts = dict[str, list[float]]
"""Tokens each expert of a layer got, by layer name in the order of depth."""


class ExpertUsageMonitor(Callback):
    """Log the skew of every layer's load under ``expert_usage/<layer>/...``, and of all under ``expert_usage/...``.

    While the model trains, the load is that of the tokens since the last look; a validation loop, which is one look
    as a whole, logs it under ``expert_usage_val/...``. Where experts are dropped (``ExpertPruning``) is a look too, at
    the experts before; the next window begins with those that are left. See ``stats.usage.load_figures`` for the
    figures. When a fit ends, the first and the last look at the same kind of text (validation, if there was any) are
    drawn beside each other, expert by expert (MC-Suite, Fig. 6): to every logger that takes figures, and to ``folder``
    as ``expert_usage.png`` with all looks in ``expert_usage.csv``. Padding is what a batch's ``attention_mask`` says.
    After a resume the first look is at the tokens since the resume alone.

    Args:
        folder: Where to write; null for the logger alone.
        every_n_steps: Optimiser steps between two looks.
    """

    def __init__(self, folder: Path | str | None = None, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise InputError(f"ExpertUsageMonitor: every_n_steps {every_n_steps}: at least 1.")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"ExpertUsageMonitor: {self.folder} is a file, not a folder.")
        self.every_n_steps = every_n_steps
        self.looks: list[tuple[str, int, Counts]] = []
        """``train`` or ``val``, optimiser step, and what each expert got, of every look so far."""
        self._training: RouterCounts | None = None
        self._validating: RouterCounts | None = None
        self._last = 0
        self._context, self._loop = ExitStack(), ExitStack()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looks = [tuple(look) for look in state_dict["looks"]]

    @property
    def last(self) -> Counts:
        """What each expert got in the last look."""
        return self.looks[-1][2]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = RouterCounts(hugging_face_model(pl_module, "ExpertUsageMonitor"))
        self._training.paused = True
        train = [step for kind, step, _ in self.looks if kind == "train" and step <= trainer.global_step]
        self._last = max(train, default=0)
        self._context.enter_context(self._training.attached())

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._training is not None
        self._end_window(trainer)
        self._training.paused = False
        self._training.next_batch(batch_mask(batch))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._training is not None
        self._training.paused = True  # layers that recompute their activations route the same tokens again

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._training is not None
        self._training.paused = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert self._training is not None
        self._training.paused = True
        if self._training.stale or trainer.global_step >= self._last + self.every_n_steps:
            self._last = trainer.global_step
            self._look(trainer, self._training, "train", pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A fit that goes on counts anew: what was counted before a cut in this step is looked at now."""
        self._end_window(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _end_window(self, trainer: Trainer) -> None:
        """Look at what was counted before experts were dropped, at whichever moment comes first after that."""
        if self._training is not None and self._training.stale:
            self._last = trainer.global_step
            self._look(trainer, self._training, "train")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_window(trainer)
        self._validating = RouterCounts(hugging_face_model(pl_module, "ExpertUsageMonitor"))
        self._loop.enter_context(self._validating.attached())

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._validating is not None
        self._validating.next_batch(batch_mask(batch))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loop.close()
        assert self._validating is not None
        if not trainer.sanity_checking:
            self._look(trainer, self._validating, "val", pl_module)

    def _look(
        self, trainer: Trainer, counts: RouterCounts, kind: str, pl_module: LightningModule | None = None
    ) -> None:
        """Other callbacks can monitor the figures where ``pl_module``, which not all hooks let log, is given."""
        taken = counts.take(lambda count_E: trainer.strategy.reduce(count_E, reduce_op="sum"))
        self.looks.append((kind, trainer.global_step, taken))
        prefix = "expert_usage" if kind == "train" else "expert_usage_val"
        figures = {f"{prefix}/{name}": value for name, value in mean_load(taken).items()}
        for layer, count_E in taken.items():
            figures |= {f"{prefix}/{layer}/{name}": value for name, value in load_figures(count_E).items()}
        if pl_module is not None:
            pl_module.log_dict(figures, logger=False, rank_zero_only=True)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_window(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end: a fit that was killed before it and goes on with no step left has none.
        if not trainer.is_global_zero or not self.looks:
            return
        from lightning_moe.callbacks.usage_panels import load_before_and_after  # matplotlib, only once it is needed

        kind = "val" if any(look[0] == "val" for look in self.looks) else "train"
        same = [look for look in self.looks if look[0] == kind]
        titles = (f"step {same[0][1]}", f"step {same[-1][1]}")
        figure = load_before_and_after(same[0][2], same[-1][2], titles)
        if self.folder is not None:
            self._write_table(self.folder / "expert_usage.csv")
            save_figure(self.folder / "expert_usage.png", figure)
        for logger in trainer.loggers:
            log_figure(logger, "expert_usage/before_and_after", figure, trainer.global_step)

    def _write_table(self, file: Path) -> None:
        with replaced_file(file) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["kind", "step", "layer", *FIGURES, "tokens per expert"])
            for kind, step, counts in self.looks:
                for layer, count_E in counts.items():
                    numbers = [f"{value:.6g}" for value in load_figures(count_E).values()]
                    writer.writerow([kind, step, layer, *numbers, " ".join(f"{count:.0f}" for count in count_E)])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._context.close()
        self._loop.close()
        self._training = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
