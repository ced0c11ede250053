"""How a model loses experts in the midst of a fit: cut on one process, masked on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from lightning_moe.callbacks.cut_checkpoint import cut_to_checkpoint
from lightning_moe.callbacks.cut_optimizer import CutParameters, carry_state
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.surgery import keep_experts

OptimizerChoice = Literal["reset", "carry"]


class InFitCut:
    """Takes experts from a model within a fit.

    One process cuts the weights, so that memory and time fall at once. Several share or split them, and what wraps a
    model for that (DDP, FSDP2) cannot be given others: there the routers see the dropped experts no more, which gives
    the same, and exports leave them out.
    """

    def __init__(self) -> None:
        self._masks, self._hooks = ExitStack(), ExitStack()
        self._several = self._masked = False

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before checkpoints are loaded: that of a cut model cuts this one."""
        self._several = trainer.world_size > 1
        if not self._several:
            register: Any = pl_module.register_load_state_dict_pre_hook
            self._hooks.callback(register(cut_to_checkpoint).remove)

    def restore(self, model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> None:
        """Take what an earlier run of the fit took; cut weights came with its checkpoint."""
        layers = find_moe_layers(model)
        if not self._masked and any(layer.kept is not None for layer in layers):
            raise InputError("ExpertPruning: an earlier fit masked experts of this model; load the model it exported.")
        if self._several and any(len(keep[layer.name]) < layer.num_experts for layer in layers):
            self._mask(model, keep)

    def apply(
        self,
        trainer: Trainer,
        model: PreTrainedModel,
        now_keep: Mapping[str, Sequence[int]],
        keep: Mapping[str, Sequence[int]],
        optimizer: OptimizerChoice,
    ) -> None:
        """Keep ``now_keep`` of what is left, which is ``keep`` of the whole model; optimisers follow."""
        cut = CutParameters(find_moe_layers(model), now_keep)
        if self._several:
            self._mask(model, keep)
        else:
            keep_experts(model, now_keep)
        if optimizer == "reset":
            trainer.strategy.setup_optimizers(trainer)
        elif not self._several:
            for one in trainer.optimizers:
                carry_state(one, cut.found())

    def _mask(self, model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> None:
        self._masks.close()
        self._masks.enter_context(mask_plan(find_moe_layers(model), keep))
        self._masked = True

    def end(self) -> None:
        """The fit is over; what it took stays gone."""
        self._hooks.close()
