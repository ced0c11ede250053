"""Merged experts: the weighted mean of several experts of a layer, in place of the one that is kept."""

# E experts

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.non_uniform import Block, per_expert_tensors

Groups = Mapping[int, Mapping[int, float]]
"""Of one layer: kept expert -> the experts averaged into it, itself among them -> their weights, which sum to 1."""

Merge = Mapping[str, Groups]
"""Layer name -> its groups. A kept expert without a group stays as it is, a dropped one in no group is thrown away."""

SUM_SLACK = 1e-3
"""How far from 1 the weights of a group may sum: people write few digits."""

AVERAGED_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""Types whose numbers can be averaged, and how safetensors spells them."""


def check_merge(shapes: Sequence[LayerShape], keep: Mapping[str, Sequence[int]], merge: Merge) -> None:
    """Refuse, in one line, groups that do not fit the layers or what is kept of them (which is checked before)."""
    known = {shape.name: shape for shape in shapes}
    for name, groups in merge.items():
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


def write_merged(kept: Tensor, stack: Tensor, dimension: int, keep: Sequence[int], groups: Groups) -> None:
    """Write the merged experts into ``kept``, which is what ``keep`` leaves of ``stack`` along ``dimension``."""
    for position, expert in enumerate(keep):
        others = joined_experts(expert, groups)
        if others:
            joined = ((stack.select(dimension, other), weight) for other, weight in others)
            kept.select(dimension, position).copy_(merged_tensor(stack.select(dimension, expert), joined))


def expert_tensors(block: Block) -> dict[str, tuple[Tensor, int]]:
    """Every tensor of the experts themselves, by name, with its expert dimension; not the router's."""
    found = per_expert_tensors(block)
    return {name: (tensor.detach(), dim) for owner, name, tensor, dim in found if owner is block.experts}


def check_averageable(name: str, spelled: str) -> None:
    """Refuse, in one line, a tensor of another type, given as safetensors spells it."""
    if spelled not in AVERAGED_TYPES.values():
        raise InputError(
            f"{name} is stored as {spelled.removeprefix('torch.')}: quantised experts cannot be merged; merge those of "
            "the model it was quantised from."
        )
