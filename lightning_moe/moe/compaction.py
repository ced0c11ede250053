"""Compaction: cut a checkpoint on disk, tensor by tensor, without loading the model."""

# E experts

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_moe.errors import InputError, first_line
from lightning_moe.files import replaced_folder
from lightning_moe.moe.checkpoints import (
    add_modelling_file,
    all_finite,
    load_model,
    resolve,
    skeleton,
    weight_files,
    write_model,
)
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.merged_experts import (
    Groups,
    Merge,
    check_averageable,
    check_merge,
    joined_experts,
    merged_tensor,
    write_merged,
)
from lightning_moe.moe.non_uniform import COUNT_NAMES
from lightning_moe.moe.skip_tables import cut_entry, store_entry
from lightning_moe.moe.skipping import CONFIG_KEY
from lightning_moe.moe.surgery import check_keep, keep_experts, set_counts
from lightning_moe.moe.weight_shards import LAYER, SHARD_BYTES, write_shards

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class _Cut:
    """What happens to the tensors of one decoder layer's MoE block on disk."""

    component: str
    """Name of the block on disk (``mlp``, ``block_sparse_moe``, ``feed_forward``), which may differ from memory."""
    num_experts: int
    keep: Sequence[int]
    groups: Groups = field(default_factory=dict)
    """Kept experts that others are averaged into."""


def compact_checkpoint(
    source: str,
    keep: Mapping[str, Sequence[int]],
    target: Path,
    shard_bytes: int = SHARD_BYTES,
    skipping: Mapping[str, Any] | None = None,
    merge: Merge | None = None,
) -> None:
    """Copy the checkpoint at ``source`` to ``target`` without the experts that ``keep`` does not name.

    Kept tensors are copied bit by bit, quantised ones included; experts are numbered anew, router rows and biases
    follow. Everything else in the folder (tokenizer, generation config) travels along. The folder is complete or
    not there at all. Raises ``InputError`` before writing when the plan does not fit the model.

    ``skipping`` is what the config shall say of skipping experts (``skip_tables.config_entry``), for the experts of
    the source; it takes the place of what the source says. Its tables are cut like the rest.

    ``merge`` names dropped experts whose weights go into kept ones, see ``merged_experts``.
    """
    merge = merge or {}
    model = skeleton(source)
    shapes = [layer.shape for layer in find_moe_layers(model)]
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
    merged = {s.index: replace(cuts[s.index], groups=merge[s.name]) for s in shapes if s.name in merge}
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
        with _opened(file) as tensors:
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


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({first_line(error)}).") from error


def _kept_tensors(files: Sequence[Path], cuts: Mapping[int, _Cut]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that stays, under its new name and at its new size."""
    with _reader(files if any(cut.groups for cut in cuts.values()) else ()) as read:
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    cut = cut_of(name, cuts)
                    if cut is None:
                        yield name, _finite(name, tensors.get_tensor(name))
                        continue
                    expert = EXPERT.search(name)
                    if expert is None:
                        yield name, _finite(name, _cut_stack(name, tensors.get_tensor(name), cut))
                    elif int(expert.group(1)) in cut.keep:
                        own = int(expert.group(1))
                        tensor = _finite(name, tensors.get_tensor(name))
                        joined = joined_experts(own, cut.groups)
                        if joined:
                            names = [(name.replace(expert.group(0), f".experts.{i}."), weight) for i, weight in joined]
                            tensor = merged_tensor(tensor, ((read(other), weight) for other, weight in names))
                        new = f".experts.{list(cut.keep).index(own)}."
                        yield name.replace(expert.group(0), new), tensor


def cut_of(name: str, cuts: Mapping[int, _Cut]) -> _Cut | None:
    """The cut of the MoE block that a tensor belongs to, if any."""
    layer = LAYER.search(name)
    cut = cuts.get(int(layer.group(1))) if layer else None
    return None if layer is None or cut is None or layer.group(2) != cut.component or "shared" in name else cut


def _cut_stack(name: str, stack: Tensor, cut: _Cut) -> Tensor:
    """What stays of a tensor of all experts, or of the router; as it is if it holds nothing of each expert."""
    dimension = next((d for d, size in enumerate(stack.shape) if size == cut.num_experts), None)
    if dimension is None:
        return stack
    kept = stack.index_select(dimension, torch.tensor(list(cut.keep)))
    if cut.groups and _of_experts(name, stack.shape):
        write_merged(kept, stack, dimension, cut.keep, cut.groups)
    return kept


def _of_experts(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of an MoE block is the experts' own and not the router's."""
    return ".experts." in name or len(shape) >= 3


def check_mergeable(source: str) -> None:
    """Raise ``InputError`` when the experts of the checkpoint at ``source`` cannot be averaged: quantised ones."""
    files = weight_files(resolve(source))
    if files[0].suffix == ".safetensors":
        shapes = [layer.shape for layer in find_moe_layers(skeleton(source))]
        _check_types(files, find_cuts(files, {s.index: (s.num_experts, range(s.num_experts)) for s in shapes}))


def _check_types(files: Sequence[Path], cuts: Mapping[int, _Cut]) -> None:
    for file in files if cuts else ():
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if cut_of(name, cuts) is not None:
                    part = tensors.get_slice(name)
                    if _of_experts(name, part.get_shape()):
                        check_averageable(name, part.get_dtype())


@contextmanager
def _reader(files: Sequence[Path]) -> Iterator[Callable[[str], Tensor]]:
    """Read any tensor by name, whichever of the files it lies in."""
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(file)) for file in files]
        holders = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118 - not a dict

        def read(name: str) -> Tensor:
            if name not in holders:
                raise InputError(f"{files[0].parent}: no {name} in its weight files; the checkpoint is incomplete.")
            return _finite(name, holders[name].get_tensor(name))

        yield read


def _finite(name: str, tensor: Tensor) -> Tensor:
    # float8 and packed integers know no isfinite; their scales do.
    if tensor.is_floating_point() and tensor.element_size() > 1 and not all_finite(tensor):
        raise InputError(f"{name} holds values that are not finite; the checkpoint is damaged.")
    return tensor


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
