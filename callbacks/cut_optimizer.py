"""Optimisers of a model that loses experts in the midst of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.non_uniform import per_expert_tensors


@dataclass(frozen=True)
class CutParameter:
    """A parameter of which some experts' slices stayed."""

    old: nn.Parameter
    new: nn.Parameter
    dimension: int
    keep: Sequence[int]


class CutParameters:
    """The parameters that a cut replaces: made before it, read after it."""

    def __init__(self, layers: Sequence[MoELayer], keep: Mapping[str, Sequence[int]]) -> None:
        self._places = [
            (owner, name, tensor, dimension, keep[layer.name])
            for layer in layers
            if layer.name in keep
            for owner, name, tensor, dimension in per_expert_tensors(layer.parts)
            if isinstance(tensor, nn.Parameter)
        ]

    def found(self) -> list[CutParameter]:
        return [
            CutParameter(old, new, dimension, keep)
            for owner, name, old, dimension, keep in self._places
            if (new := getattr(owner, name)) is not old
        ]


def carry_state(optimizer: torch.optim.Optimizer, cut: Sequence[CutParameter]) -> None:
    """Let ``optimizer`` train the new parameters, with what it knows of the slices that stayed.

    State with a slice per expert (Adam's moments, a momentum) is cut like the parameter; one figure for all of them,
    such as a count of steps, is kept as it is. Raises ``InputError`` for state that does not say whose each part is.
    """
    by_old = {id(one.old): one for one in cut}
    for group in optimizer.param_groups:
        group["params"] = [by_old[id(p)].new if id(p) in by_old else p for p in group["params"]]
    for one in cut:
        state: dict[str, Any] | None = optimizer.state.pop(one.old, None)
        if state is not None:
            optimizer.state[one.new] = {name: _cut(value, one) for name, value in state.items()}


def _cut(value: Any, one: CutParameter) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() == one.old.dim() and value.shape[one.dimension] == 1:
        return value  # one figure for all experts, as Adafactor has some
    if value.dim() != one.old.dim() or value.shape[one.dimension] != one.old.shape[one.dimension]:
        raise InputError(
            f"ExpertPruning: an optimiser's state of shape {tuple(value.shape)} for a weight of {tuple(one.old.shape)} "
            "does not say which part is which expert's; take `optimizer: reset`."
        )
    return value.index_select(one.dimension, torch.tensor(one.keep, device=value.device))
