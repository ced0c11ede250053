"""GradientPass: forward and backward over text in a predict loop, to sum gradients; nothing learns."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule

from lightning_moe.modules.causal_lm import Batch, MoECausalLM, next_token_loss
from lightning_moe.stats.gradients import GradientSums


class GradientPass(LightningModule):
    """Adds the gradient of the next-token loss of every batch to ``sums``.

    It is meant for ``Trainer.predict`` with the loop's ``inference_mode`` off, for what is made in that mode has no
    gradients.
    """

    def __init__(self, model: MoECausalLM, sums: GradientSums) -> None:
        super().__init__()
        self.model, self.sums = model, sums

    def configure_model(self) -> None:
        self.model.configure_model()

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad(), self.sums.attached(self.model.network):
            loss_B, _ = next_token_loss(self.model(batch), batch)
            self.sums.backward(loss_B.sum())
