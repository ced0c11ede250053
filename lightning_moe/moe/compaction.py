"""Compaction: cut a checkpoint on disk, tensor by tensor, without loading the model."""

# E experts

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.files import replaced_folder
from lightning_moe.moe.checkpoints import (
    add_modelling_file,
    load_model,
    resolve,
    skeleton,
    weight_files,
    write_model,
)
from lightning_moe.moe.disk_layout import DiskLayout
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.merged_experts import (
    NO_MERGE,
    Groups,
    Merge,
    Reorder,
    as_it_is,
    check_averageable,
    check_merge,
    joined_experts,
    merged_row,
    merged_tensor,
    write_merged,
)
from lightning_moe.moe.neuron_order import NeuronAxis, NeuronOrders, axes_in_memory
from lightning_moe.moe.non_uniform import COUNT_NAMES
from lightning_moe.moe.skip_tables import cut_entry, store_entry
from lightning_moe.moe.skipping import CONFIG_KEY
from lightning_moe.moe.surgery import check_keep, keep_experts, set_counts
from lightning_moe.moe.tensor_reader import TensorReader, finite, opened, tensor_reader
from lightning_moe.moe.weight_shards import LAYER, SHARD_BYTES, write_shards

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

EXPERT = re.compile(r"\.experts\.(\d+)\.")
FIRST = ".experts.0."


@dataclass(frozen=True)
class _Cut:
    """What happens to the tensors of one decoder layer's MoE block on disk."""

    component: str
    """Name of the block on disk (``mlp``, ``block_sparse_moe``, ``feed_forward``), which may differ from memory."""
    num_experts: int
    keep: Sequence[int]
    groups: Groups = field(default_factory=dict)
    """Kept experts that others are averaged into."""
    router: bool = False
    """Whether the router's rows are averaged along."""
    axes: Mapping[str, NeuronAxis] = field(default_factory=dict)
    """Where the neurons of an expert lie, by name of the tensor (of expert 0); empty when they are not aligned."""


def compact_checkpoint(
    source: str,
    keep: Mapping[str, Sequence[int]],
    target: Path,
    shard_bytes: int = SHARD_BYTES,
    skipping: Mapping[str, Any] | None = None,
    merge: Merge = NO_MERGE,
) -> None:
    """Copy the checkpoint at ``source`` to ``target`` without the experts that ``keep`` does not name.

    Kept tensors are copied bit by bit, quantised ones included; experts are numbered anew, router rows and biases
    follow. Everything else in the folder (tokenizer, generation config) travels along. The folder is complete or
    not there at all. Raises ``InputError`` before writing when the plan does not fit the model.

    ``skipping`` is what the config shall say of skipping experts (``skip_tables.config_entry``), for the experts of
    the source; it takes the place of what the source says. Its tables are cut like the rest.

    ``merge`` names dropped experts whose weights go into kept ones, see ``merged_experts``.
    """
    model = skeleton(source)
    layers = find_moe_layers(model)
    shapes = [layer.shape for layer in layers]
    check_keep(shapes, keep)
    check_merge(shapes, keep, merge)
    folder = resolve(source)
    files = weight_files(folder)
    if files[0].suffix == ".bin":  # old checkpoints: no reading by tensor, so through memory
        loaded = load_model(source)
        if skipping is not None:
            store_entry(loaded.config, skipping)
        keep_experts(loaded, keep, merge)
        with replaced_folder(target) as beside:
            _copy_companions(folder, beside)
            write_model(loaded, beside)
        return
    by_index = {shape.index: (shape.num_experts, keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    cuts = find_cuts(files, by_index)
    merging = [layer for layer in layers if layer.name in merge.groups]
    axes = _axes(files, model, merging, cuts) if merge.align else {}
    merged = {
        layer.parts.index: replace(
            cuts[layer.parts.index],
            groups=merge.groups[layer.name],
            router=merge.router == "mean",
            axes=axes.get(layer.name, {}),
        )
        for layer in merging
    }
    _check_types(files, merged)
    set_counts(model.config, {shape.index: len(by_index[shape.index][1]) for shape in shapes})
    if skipping is not None:
        store_entry(model.config, skipping)
    cut_entry(model.config, {index: ids for index, (_, ids) in by_index.items()})
    with replaced_folder(target) as beside:
        _copy_companions(folder, beside)
        write_shards(_kept_tensors(files, {**cuts, **merged}), beside, shard_bytes)
        config = _with_counts(json.loads((folder / "config.json").read_text()), model.config, type(model).__name__)
        add_modelling_file(config, beside)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _copy_companions(folder: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation config, chat template; no weights of other formats."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith((".index.json", *WEIGHT_SUFFIXES)):
            shutil.copy(file, target)


def find_cuts(files: Sequence[Path], by_index: Mapping[int, tuple[int, Sequence[int]]]) -> dict[int, _Cut]:
    """Find each MoE block on disk: where the per-expert tensors, or the stacks ``(E, ., .)``, of a layer lie."""
    cuts: dict[int, _Cut] = {}
    experts_seen: dict[int, set[int]] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                layer = LAYER.search(name)
                if layer is None or int(layer.group(1)) not in by_index or "shared" in name:
                    continue
                index, component = int(layer.group(1)), layer.group(2)
                num_experts, keep = by_index[index]
                expert = EXPERT.search(name)
                if expert is not None:
                    experts_seen.setdefault(index, set()).add(int(expert.group(1)))
                shape = tensors.get_slice(name).get_shape()
                if expert is not None or (len(shape) >= 3 and shape[0] == num_experts):
                    cuts[index] = _Cut(component, num_experts, keep)
    for index, (num_experts, _) in by_index.items():
        seen = experts_seen.get(index, set(range(num_experts)))
        if index not in cuts or seen != set(range(num_experts)):
            raise InputError(
                f"{files[0].parent}: decoder layer {index} should hold {num_experts} experts, but its weight files "
                f"hold {len(seen) if index in cuts else 0}; the checkpoint is incomplete."
            )
    return cuts


def _kept_tensors(files: Sequence[Path], cuts: Mapping[int, _Cut]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that stays, under its new name and at its new size."""
    with tensor_reader(files if any(cut.groups for cut in cuts.values()) else ()) as reader:
        orders = {id(cut): NeuronOrders(cut.axes, partial(_of_expert, reader)) for cut in cuts.values()}
        for file in files:
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    cut = cut_of(name, cuts)
                    if cut is None:
                        yield name, finite(name, tensors.get_tensor(name))
                        continue
                    expert = EXPERT.search(name)
                    reorder = partial(orders[id(cut)].reordered, EXPERT.sub(FIRST, name)) if cut.axes else as_it_is
                    if expert is None:
                        stack = finite(name, tensors.get_tensor(name))
                        yield name, _cut_stack(name, stack, cut, reorder)
                    elif int(expert.group(1)) in cut.keep:
                        own = int(expert.group(1))
                        tensor = finite(name, tensors.get_tensor(name))
                        joined = joined_experts(own, cut.groups)
                        if joined:
                            others = ((i, _of_expert(reader, name, i), weight) for i, weight in joined)
                            tensor = merged_tensor(tensor, ((reorder(own, i, t), weight) for i, t, weight in others))
                        yield EXPERT.sub(f".experts.{list(cut.keep).index(own)}.", name), tensor


def _of_expert(reader: TensorReader, name: str, expert: int) -> Tensor:
    """One expert's tensor, where ``name`` is that of any expert, or its slice of a stack."""
    if EXPERT.search(name):
        return reader.tensor(EXPERT.sub(f".experts.{expert}.", name))
    return reader.row(name, expert)


def _axes(
    files: Sequence[Path], model: PreTrainedModel, layers: Sequence[MoELayer], cuts: Mapping[int, _Cut]
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


def cut_of(name: str, cuts: Mapping[int, _Cut]) -> _Cut | None:
    """The cut of the MoE block that a tensor belongs to, if any."""
    layer = LAYER.search(name)
    cut = cuts.get(int(layer.group(1))) if layer else None
    return None if layer is None or cut is None or layer.group(2) != cut.component or "shared" in name else cut


def _cut_stack(name: str, stack: Tensor, cut: _Cut, reorder: Reorder) -> Tensor:
    """What stays of a tensor of all experts, or of the router; as it is if it holds nothing of each expert."""
    dimension = next((d for d, size in enumerate(stack.shape) if size == cut.num_experts), None)
    if dimension is None:
        return stack
    kept = stack.index_select(dimension, torch.tensor(list(cut.keep)))
    if cut.groups and _averaged(name, stack.shape, cut):
        mean = merged_tensor if _of_experts(name, stack.shape) else merged_row
        write_merged(kept, stack, dimension, cut.keep, cut.groups, mean, reorder)
    return kept


def _averaged(name: str, shape: Sequence[int], cut: _Cut) -> bool:
    """Whether a tensor of an MoE block takes part in merging: the experts' own do, the router's where it is asked."""
    return _of_experts(name, shape) or (cut.router and cut.num_experts in shape)


def _of_experts(name: str, shape: Sequence[int]) -> bool:
    return ".experts." in name or len(shape) >= 3


def check_mergeable(source: str, align: bool = False) -> None:
    """Raise ``InputError`` when the experts of the checkpoint at ``source`` cannot be averaged: quantised ones.

    Or, with ``align``, when it is not known where their neurons lie.
    """
    files = weight_files(resolve(source))
    if files[0].suffix == ".safetensors":
        model = skeleton(source)
        layers = find_moe_layers(model)
        cuts = find_cuts(files, {one.parts.index: (one.num_experts, range(one.num_experts)) for one in layers})
        _check_types(files, cuts)
        if align:
            _axes(files, model, layers, cuts)


def _check_types(files: Sequence[Path], cuts: Mapping[int, _Cut]) -> None:
    for file in files if cuts else ():
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                cut = cut_of(name, cuts)
                if cut is not None:
                    part = tensors.get_slice(name)
                    if _averaged(name, part.get_shape(), cut):
                        check_averageable(name, part.get_dtype())


def _with_counts(raw: dict[str, Any], config: PreTrainedConfig, type_name: str) -> dict[str, Any]:
    """The config as it lay on disk, with only the counts of experts and the skip tables changed."""
    holder, settled = raw.get("text_config", raw), config.get_text_config().to_dict()
    for name in ("per_layer_config", "allow_global_per_layer_attribute_access", CONFIG_KEY):
        if settled.get(name):
            holder[name] = settled[name]
        else:
            holder.pop(name, None)
    for alias, name in config.get_text_config().attribute_map.items():
        if name in COUNT_NAMES:
            holder.pop(alias, None)  # two names for one count would contradict each other
    for name in COUNT_NAMES:
        if isinstance(settled.get(name), int):
            holder[name] = settled[name]
    if "output_router_logits" in holder:
        holder["output_router_logits"] = settled.get("output_router_logits", False)
    if not raw.get("architectures"):
        raw["architectures"] = [type_name]
    return raw
