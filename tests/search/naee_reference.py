"""NAEE as anybody would write it: mask the router, run the block again, for every set of experts."""

# W windows, S positions, H model width

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import mask_experts, mask_plan

Window = Mapping[str, Tensor]
Keep = dict[str, list[int]]


def sets_of(layer: MoELayer, drop: int) -> list[tuple[int, ...]]:
    """Every set that can stay, in the order of ids; a group-limited router keeps as many in each of its groups."""
    shape = layer.shape
    each = (shape.num_experts - drop) // shape.num_groups
    return [
        keep
        for keep in combinations(range(shape.num_experts), shape.num_experts - drop)
        if all(sum(one // shape.group_size == group for one in keep) == each for group in range(shape.num_groups))
    ]


@torch.no_grad()
def errors_of(
    model: PreTrainedModel, layer: MoELayer, windows: Sequence[Window], keeps: Sequence[Sequence[int]], earlier: Keep
) -> list[float]:
    """``sum over windows || Z - Zhat ||_F``, the inputs being those of the model with ``earlier`` masked.

    No expert at all gives nothing: ``Zhat = 0``.
    """
    errors = [0.0] * len(keeps)
    for window in windows:
        real_S = window["attention_mask"][0].bool()
        if not real_S.any():
            continue
        inputs: list[Any] = []
        handle = layer.parts.block.register_forward_pre_hook(
            lambda module, args, kwargs, inputs=inputs: inputs.append((args, kwargs)), with_kwargs=True
        )
        with mask_plan(find_moe_layers(model), earlier):
            model(window["input_ids"], attention_mask=window["attention_mask"], use_cache=False)
        handle.remove()
        whole_SH = _routed(layer, *inputs[0])
        for turn, keep in enumerate(keeps):
            left_SH = torch.zeros_like(whole_SH)
            if keep:
                with mask_experts(layer, keep):
                    left_SH = _routed(layer, *inputs[0])
            errors[turn] += float((whole_SH - left_SH)[real_S].norm())
    return errors


def _routed(layer: MoELayer, args: Any, kwargs: Any) -> Tensor:
    """What the routed experts give when the block runs, ``(S, H)`` float64."""
    seen: list[Tensor] = []
    handle = layer.experts.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.parts.block(*args, **kwargs)
    handle.remove()
    return seen[0].flatten(0, -2).double()


def chosen_sets(
    model: PreTrainedModel, windows: Sequence[Window], drop: int, progressive: bool
) -> tuple[Keep, dict[str, float]]:
    """The sets of all layers, and how far the output moves without the others, over its size."""
    keep: Keep = {}
    moved: dict[str, float] = {}
    for layer in find_moe_layers(model):
        sets = sets_of(layer, drop)
        *errors, size = errors_of(model, layer, windows, [*sets, ()], keep if progressive else {})
        best = errors.index(min(errors))
        keep[layer.name], moved[layer.name] = list(sets[best]), errors[best] / size
    return keep, moved


def one_by_one(ids_WS: Tensor, mask_WS: Tensor | None = None) -> list[Window]:
    mask_WS = torch.ones_like(ids_WS) if mask_WS is None else mask_WS
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in _rows(ids_WS, mask_WS)]


def _rows(ids_WS: Tensor, mask_WS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((ids_WS[[row]], mask_WS[[row]]) for row in range(len(ids_WS)))
