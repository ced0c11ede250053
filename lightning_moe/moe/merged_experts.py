"""Merged experts: the weighted mean of several experts of a layer, in place of the one that is kept."""

# E experts

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape, MoELayer
from lightning_moe.moe.neuron_order import NeuronOrders, axes_in_memory
from lightning_moe.moe.non_uniform import per_expert_tensors

Groups = Mapping[int, Mapping[int, float]]
"""Of one layer: kept expert -> the experts averaged into it, itself among them -> their weights, which sum to 1."""

Router = Literal["kept", "mean"]
"""What routes tokens to a group: the row of the kept expert, or the mean of its members' rows, see ``merged_row``."""

Reorder = Callable[[int, int, Tensor], Tensor]
"""``(kept expert, other expert, tensor of the other) -> that tensor``, as it is to be averaged."""

Mean = Callable[[Tensor, Iterable[tuple[Tensor, float]]], Tensor]
"""``(own, others with their weights) -> mean``."""


@dataclass(frozen=True)
class Merge:
    """Which dropped experts go into which kept ones, and how."""

    groups: Mapping[str, Groups] = field(default_factory=dict)
    """By layer. A kept expert without a group stays as it is, a dropped one in no group is thrown away."""
    align: bool = False
    """Whether the neurons of each joined expert are first put in the order that fits the kept one, see
    ``neuron_order``."""
    router: Router = "kept"
    """``mean`` averages the router's rows, see ``merged_row``, and its biases, by the weights of the group."""

    @property
    def settings(self) -> dict[str, Any]:
        """How, in plain values."""
        return {"align": self.align, "router": self.router}


NO_MERGE = Merge()

SUM_SLACK = 1e-3
"""How far from 1 the weights of a group may sum: people write few digits."""

AVERAGED_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""Types whose numbers can be averaged, and how safetensors spells them."""


def check_merge(shapes: Sequence[LayerShape], keep: Mapping[str, Sequence[int]], merge: Merge) -> None:
    """Refuse, in one line, groups that do not fit the layers or what is kept of them (which is checked before)."""
    known = {shape.name: shape for shape in shapes}
    for name, groups in merge.groups.items():
        if name not in known:
            raise InputError(f"the plan merges experts of a layer {name!r} that the model does not have.")
        _check_groups(known[name], keep.get(name, range(known[name].num_experts)), groups)


def _check_groups(shape: LayerShape, keep: Sequence[int], groups: Groups) -> None:
    joined: set[int] = set()
    for kept, group in groups.items():
        for expert in (kept, *group):
            if type(expert) is not int or not 0 <= expert < shape.num_experts:
                raise InputError(
                    f"{shape.name}: the plan merges expert {expert!r}, but the layer has experts 0 to "
                    f"{shape.num_experts - 1}."
                )
        if kept not in keep:
            raise InputError(f"{shape.name}: the plan merges others into expert {kept}, which it does not keep.")
        for expert, weight in group.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
                raise InputError(
                    f"{shape.name}: expert {expert} is merged into {kept} with the weight {weight!r}, which must be a "
                    "number from 0 to 1."
                )
            if expert == kept:
                continue
            if expert in keep:
                raise InputError(
                    f"{shape.name}: the plan merges expert {expert} into {kept}, but keeps it too; only dropped ones "
                    "can be merged."
                )
            if expert in joined:
                raise InputError(f"{shape.name}: the plan merges expert {expert} twice; each joins one group.")
            joined.add(expert)
        if abs(sum(group.values()) - 1) > SUM_SLACK:
            raise InputError(
                f"{shape.name}: the weights merged into expert {kept} sum to {sum(group.values()):.6g}, not to 1; its "
                "own weight is one of them."
            )


def joined_experts(kept: int, groups: Groups) -> list[tuple[int, float]]:
    """The other experts of a kept one's group with their weights, by id; those of weight 0 left out."""
    return [(expert, weight) for expert, weight in sorted(groups.get(kept, {}).items()) if expert != kept and weight]


def merged_tensor(own: Tensor, joined: Iterable[tuple[Tensor, float]]) -> Tensor:
    """``own + sum of weight x (other - own)``, in float32 or better, returned in the type of ``own``.

    Where the weights of the group sum to 1, that is their weighted mean; and it is ``own`` exactly when the others
    equal it. The product is rounded before it is added, so that no layout of the tensors changes a bit.
    """
    exact = own.to(torch.promote_types(own.dtype, torch.float32))
    total = exact.clone()
    for other, weight in joined:
        total += (other.to(exact.dtype) - exact) * weight
    return total.to(own.dtype)


def merged_row(own: Tensor, joined: Iterable[tuple[Tensor, float]]) -> Tensor:
    """``merged_tensor`` of rows of the router, as long as the kept expert's own.

    A mean of rows that point different ways is short, and its small logits would lose the group's tokens to others. A
    bias, which is one number per expert, has no direction and is only averaged.
    """
    exact = own.to(torch.promote_types(own.dtype, torch.float32))
    mean = merged_tensor(exact, joined)
    length = mean.norm()
    if own.numel() > 1 and length:
        mean *= exact.norm() / length
    return mean.to(own.dtype)


def as_it_is(kept: int, other: int, tensor: Tensor) -> Tensor:
    """The ``Reorder`` that changes nothing."""
    return tensor


def write_merged(
    kept: Tensor,
    stack: Tensor,
    dimension: int,
    keep: Sequence[int],
    groups: Groups,
    mean: Mean,
    reorder: Reorder = as_it_is,
) -> None:
    """Write merged experts, or rows, into ``kept``, which is what ``keep`` leaves of ``stack`` along ``dimension``."""
    for position, expert in enumerate(keep):
        others = joined_experts(expert, groups)
        if others:
            joined = ((reorder(expert, i, stack.select(dimension, i)), weight) for i, weight in others)
            kept.select(dimension, position).copy_(mean(stack.select(dimension, expert), joined))


class LayerMerge:
    """Merging in one layer of a model in memory: made before the layer is cut, since it needs what the cut drops."""

    def __init__(self, layer: MoELayer, merge: Merge) -> None:
        self._groups = merge.groups[layer.name]
        self._stacks = [
            (owner, name, tensor.detach(), dimension)
            for owner, name, tensor, dimension in per_expert_tensors(layer.parts)
            if owner is layer.experts or merge.router == "mean"
        ]
        own = {name: (tensor, dimension) for owner, name, tensor, dimension in self._stacks if owner is layer.experts}
        axes = axes_in_memory(layer.experts) if merge.align else {}
        self._orders = NeuronOrders(axes, lambda name, expert: own[name][0].select(own[name][1], expert))
        self._experts = layer.experts
        for _, name, tensor, _ in self._stacks:
            check_averageable(f"{layer.name}: {name}", AVERAGED_TYPES.get(tensor.dtype, str(tensor.dtype)))

    def write(self, keep: Sequence[int]) -> None:
        """Average into the layer, which is cut to ``keep`` by now."""
        for owner, name, stack, dimension in self._stacks:
            kept = getattr(owner, name).detach()
            if owner is self._experts:
                reorder = partial(self._orders.reordered, name)
                write_merged(kept, stack, dimension, keep, self._groups, merged_tensor, reorder)
            else:
                write_merged(kept, stack, dimension, keep, self._groups, merged_row)


def check_averageable(name: str, spelled: str) -> None:
    """Refuse, in one line, a tensor of another type, given as safetensors spells it."""
    if spelled not in AVERAGED_TYPES.values():
        raise InputError(
            f"{name} is stored as {spelled.removeprefix('torch.')}: quantised experts cannot be merged; merge those of "
            "the model it was quantised from."
        )
