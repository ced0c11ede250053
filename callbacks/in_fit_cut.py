"""How a model loses experts in the midst of a fit: cut where this process has it for itself, or else masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from lightning_moe.callbacks.cut_checkpoint import cut_to_checkpoint
from lightning_moe.callbacks.cut_optimizer import CutParameters, carry_state
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.split_tensors import is_sharded
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.plan import compose

OptimizerChoice = Literal["reset", "carry"]


class InFitCut:
    """Takes experts from a model within a fit.

    A process that has the model for itself cuts the weights, so that memory and time fall at once. What wraps or splits
    a model for several (DDP, FSDP2) cannot be given other weights: there the routers see the dropped experts no more,
    which gives the same, and exports leave them out. A fit that goes on takes weights as its checkpoint has them, cut
    or whole: what is masked stays masked.
    """

    def __init__(self) -> None:
        self._masks, self._hooks = ExitStack(), ExitStack()
        self._masked = False

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before checkpoints are loaded: that of a cut model cuts this one, unless it is wrapped or split by then."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            register: Any = pl_module.register_load_state_dict_pre_hook
            self._hooks.callback(register(cut_to_checkpoint).remove)

    def check_unmasked(self, model: PreTrainedModel) -> None:
        """Refuse a model that somebody else masked."""
        if not self._masked and any(layer.kept is not None for layer in find_moe_layers(model)):
            raise InputError("ExpertPruning: an earlier fit masked experts of this model; load the model it exported.")

    def restore(self, model: PreTrainedModel, rounds: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Take what an earlier run of the fit took; the weights of its checkpoint are loaded.

        ``rounds`` are the experts kept at first, which are all, and by each round.
        """
        self.check_unmasked(model)
        layers = find_moe_layers(model)
        found = [layer.num_experts for layer in layers]
        held = next((keep for keep in rounds if [len(ids) for ids in keep.values()] == found), None)
        if held is None:
            raise InputError(
                f"ExpertPruning: the model's layers have {found} experts, the checkpoint is of a fit that kept "
                f"{[len(ids) for ids in rounds[-1].values()]} of {[len(ids) for ids in rounds[0].values()]}; go on "
                "with the model that it was made of."
            )
        places = {name: [held[name].index(expert) for expert in ids] for name, ids in rounds[-1].items()}
        biases = [(bias, bias.detach().clone()) for layer in layers for bias in layer.correction_biases]
        self._mask(layers, places)
        with torch.no_grad():
            for bias, loaded in biases:  # an earlier mask has put its own back
                bias.copy_(loaded)

    def apply(
        self,
        trainer: Trainer,
        model: PreTrainedModel,
        keep: Mapping[str, Sequence[int]],
        optimizer: OptimizerChoice,
    ) -> None:
        """Keep these of what is left; optimisers follow."""
        layers = find_moe_layers(model)
        cut = CutParameters(layers, keep)
        mask = self._masked or trainer.model is not trainer.lightning_module or is_sharded(model)
        if mask:
            left = {layer.name: layer.kept or list(range(layer.num_experts)) for layer in layers}
            self._mask(layers, compose(left, keep))
        else:
            keep_experts(model, keep)
        if optimizer == "reset":
            trainer.strategy.setup_optimizers(trainer)
        elif not mask:
            for one in trainer.optimizers:
                carry_state(one, cut.found())

    def _mask(self, layers: Sequence[MoELayer], places: Mapping[str, Sequence[int]]) -> None:
        self._masks.close()
        self._masked = any(len(places[layer.name]) < layer.num_experts for layer in layers)
        if self._masked:
            self._masks.enter_context(mask_plan(layers, places))

    def end(self) -> None:
        """The fit is over; what it took stays gone."""
        self._hooks.close()
