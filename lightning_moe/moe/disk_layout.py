"""Disk layout: which part of a model's stacks each tensor of the experts on disk is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from lightning_moe.errors import InputError
from lightning_moe.moe.neuron_order import NeuronAxis, axes_in_memory


class DiskLayout:
    """Reads transformers' own rules of how the tensors of a checkpoint become those of this model."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = cast("list[Any]", get_model_conversion_mapping(model))
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def axis(self, name: str, experts: nn.Module, one_by_one: bool) -> NeuronAxis | None:
        """Where the neurons lie in a tensor of one expert, or in one expert's slice of a stack; None for none.

        ``one_by_one`` says that the experts lie on disk each for itself. Raises ``InputError`` for stacks that are
        rearranged when they are loaded.
        """
        target, matched = rename_source_key(name, self._renamings, self._converters)
        axis = axes_in_memory(experts).get(target.rpartition(".")[2])
        if axis is None or matched is None:
            return axis
        if not one_by_one:
            raise InputError(
                f"{name} is stored in another order than the model computes in, so neurons of experts cannot be "
                'aligned on disk; merge without, by `"align": false` in the plan.'
            )
        # Each is the matrix of a linear map, (out, in): the neurons are what gate and up give, and what down takes.
        pieces = next(rule.source_patterns for rule in self._converters if matched in rule.source_patterns)
        taken = axis.place[0].startswith("down")
        return replace(
            axis,
            place=(axis.place[0], pieces.index(matched)),
            dimension=1 if taken and not name.endswith("bias") else 0,
            parts=1,
            interleaved=False,
        )
