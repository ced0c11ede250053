"""gradient-criteria: the pass that sums gradients over a bare forward and backward of the same matrices.

Both run in turn on each batch of one predict loop, so Lightning's own cost counts as ours; and so do the figures made
of the sums at the end, on a text that is but a fortieth of the paper's. The bare one lets autograd sum the gradients.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.diep_step import batches, prepared
from benchmarks.observe import SETTINGS
from benchmarks.ratios import QUIET, report, seconds_of
from lightning_moe.modules.causal_lm import Batch, MoECausalLM, next_token_loss
from lightning_moe.modules.gradient_pass import GradientPass
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.stats.gradients import GradientSums

GOAL = 1.15
WINDOWS = 4
"""Of 256 tokens."""


def floor_step(model: MoECausalLM, batch: Batch) -> None:
    """What any sum of gradients has to compute."""
    stacks = [stack for layer in model.moe_layers for stack in stacked_parameters(layer.experts).values()]
    for stack in stacks:
        stack.requires_grad_(True)
    with torch.enable_grad():
        loss_B, _ = next_token_loss(model(batch), batch)
        loss_B.sum().backward()
    for stack in stacks:
        stack.requires_grad_(False)


class FloorBeside(Callback):
    """Times each step of a pass, and the floor on the same batch, before or after it in turn; the first is warm-up."""

    def __init__(self, model: MoECausalLM) -> None:
        self.model = model
        self.ours = self.floor = 0.0
        self._start = 0.0

    def _time_floor(self, batch: Batch, batch_idx: int) -> None:
        seconds = seconds_of(lambda: floor_step(self.model, batch))
        self.floor += seconds if batch_idx else 0.0

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx % 2:
            self._time_floor(batch, batch_idx)
        self._start = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.ours += time.perf_counter() - self._start if batch_idx else 0.0
        if batch_idx % 2 == 0:
            self._time_floor(batch, batch_idx)


def ratio(setting: tuple[int, int, int], steps: int) -> float:
    model = prepared(setting)
    beside, sums = FloorBeside(model), GradientSums(model.moe_layers)
    trainer = Trainer(
        logger=False,
        inference_mode=False,
        callbacks=[beside],
        **QUIET,
    )
    text = [{name: tensor[:WINDOWS] for name, tensor in batch.items()} for batch in batches(steps + 1)]
    loader = DataLoader(text, batch_size=None)  # type: ignore[arg-type]
    trainer.predict(GradientPass(model, sums), loader, return_predictions=False)
    return (beside.ours + seconds_of(sums.figures)) / beside.floor


def main(repeats: int = 12) -> None:
    """The slower of the settings, on as many batches of 1024 tokens."""
    report("gradient-criteria", max(ratio(setting, repeats) for setting in SETTINGS.values()), GOAL)


if __name__ == "__main__":
    main()
