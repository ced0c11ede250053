"""Kept tensors: what stays of a checkpoint on disk, tensor by tensor, dropped experts merged into kept ones."""

# E experts

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.block_cuts import EXPERT, FIRST, BlockCut, cut_of, name_after
from lightning_moe.moe.disk_layout import DiskLayout
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.merged_experts import (
    Reorder,
    as_it_is,
    check_averageable,
    joined_experts,
    merged_row,
    merged_tensor,
    write_merged,
)
from lightning_moe.moe.neuron_order import NeuronAxis, NeuronOrders, axes_in_memory
from lightning_moe.moe.tensor_reader import TensorReader, finite, opened, tensor_reader


def kept_tensors(
    files: Sequence[Path], cuts: Mapping[int, BlockCut], dropped: Collection[int] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that stays, under its new name and at its new size; ``dropped`` are decoder layers that go."""
    with tensor_reader(files if any(cut.groups for cut in cuts.values()) else ()) as reader:
        orders = {id(cut): NeuronOrders(cut.axes, partial(_of_expert, reader)) for cut in cuts.values()}
        for file in files:
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    cut, after = cut_of(name, cuts), name_after(name, cuts, dropped)
                    if after is None:
                        continue
                    if cut is None:
                        yield after, finite(name, tensors.get_tensor(name))
                        continue
                    expert = EXPERT.search(name)
                    reorder = partial(orders[id(cut)].reordered, EXPERT.sub(FIRST, name)) if cut.axes else as_it_is
                    if expert is None:
                        stack = finite(name, tensors.get_tensor(name))
                        yield after, _cut_stack(name, stack, cut, reorder)
                    elif int(expert.group(1)) in cut.keep:
                        own = int(expert.group(1))
                        tensor = finite(name, tensors.get_tensor(name))
                        joined = joined_experts(own, cut.groups)
                        if joined:
                            others = ((i, _of_expert(reader, name, i), weight) for i, weight in joined)
                            tensor = merged_tensor(tensor, ((reorder(own, i, t), weight) for i, t, weight in others))
                        yield EXPERT.sub(f".experts.{list(cut.keep).index(own)}.", after), tensor


def _of_expert(reader: TensorReader, name: str, expert: int) -> Tensor:
    """One expert's tensor, where ``name`` is that of any expert, or its slice of a stack."""
    if EXPERT.search(name):
        return reader.tensor(EXPERT.sub(f".experts.{expert}.", name))
    return reader.row(name, expert)


def neuron_axes(
    files: Sequence[Path], model: PreTrainedModel, layers: Sequence[MoELayer], cuts: Mapping[int, BlockCut]
) -> dict[str, dict[str, NeuronAxis]]:
    """Where the neurons lie in every tensor of one expert, layer by layer; the names are those of expert 0."""
    layout = DiskLayout(model)
    with tensor_reader(files) as reader:
        names = [name for name in reader.names if EXPERT.sub(FIRST, name) == name]
    found: dict[str, dict[str, NeuronAxis]] = {}
    for layer in layers:
        cut = {layer.parts.index: cuts[layer.parts.index]}
        known = {name: layout.axis(name, layer.experts, FIRST in name) for name in names if cut_of(name, cut)}
        axes = {name: axis for name, axis in known.items() if axis is not None}
        if {axis.place[0] for axis in axes.values()} != axes_in_memory(layer.experts).keys():
            raise InputError(
                f"{files[0].parent}: its names do not tell what each tensor of {layer.name} is, so neurons of experts "
                'cannot be aligned on disk; merge without, by `"align": false` in the plan.'
            )
        found[layer.name] = axes
    return found


def _cut_stack(name: str, stack: Tensor, cut: BlockCut, reorder: Reorder) -> Tensor:
    """What stays of a tensor of all experts, or of the router; as it is if it holds nothing of each expert."""
    dimension = next((d for d, size in enumerate(stack.shape) if size == cut.num_experts), None)
    if dimension is None:
        return stack
    kept = stack.index_select(dimension, torch.tensor(list(cut.keep)))
    if cut.groups and _averaged(name, stack.shape, cut):
        mean = merged_tensor if _of_experts(name, stack.shape) else merged_row
        write_merged(kept, stack, dimension, cut.keep, cut.groups, mean, reorder)
    return kept


def _averaged(name: str, shape: Sequence[int], cut: BlockCut) -> bool:
    """Whether a tensor of an MoE block takes part in merging: the experts' own do, the router's where it is asked."""
    return _of_experts(name, shape) or (cut.router and cut.num_experts in shape)


def _of_experts(name: str, shape: Sequence[int]) -> bool:
    return ".experts." in name or len(shape) >= 3


def check_types(files: Sequence[Path], cuts: Mapping[int, BlockCut]) -> None:
    for file in files if cuts else ():
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                cut = cut_of(name, cuts)
                if cut is not None:
                    part = tensors.get_slice(name)
                    if _averaged(name, part.get_shape(), cut):
                        check_averageable(name, part.get_dtype())
