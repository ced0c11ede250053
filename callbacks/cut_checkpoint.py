"""A model cut to the checkpoint that is about to be loaded into it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers, hugging_face_model
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.surgery import keep_experts


def cut_to_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before weights are loaded, cut the model to the experts that they are of; which ones they are does not matter."""
    model = hugging_face_model(module, "ExpertPruning")
    (path,) = [name for name, part in module.named_modules() if part is model][:1]
    keep = {}
    for layer in find_moe_layers(model):
        experts = next(name for name, part in model.named_modules() if part is layer.experts)
        stack = next(iter(stacked_parameters(layer.experts)))
        stored = state_dict.get(f"{prefix}{path}.{experts}.{stack}")
        if stored is None:
            continue
        if stored.shape[0] > layer.num_experts:
            raise InputError(
                f"ExpertPruning: {layer.name} has {layer.num_experts} experts, its checkpoint {stored.shape[0]}; load "
                "it into a new model, from which none was cut yet."
            )
        if stored.shape[0] < layer.num_experts:
            # Group-limited routers keep as many in each group.
            shape, stay = layer.shape, stored.shape[0] // layer.shape.num_groups
            firsts = range(0, shape.num_experts, shape.group_size)
            keep[layer.name] = [first + place for first in firsts for place in range(stay)]
    if keep:
        keep_experts(model, keep)
