"""Compaction: cut a checkpoint on disk, tensor by tensor, without loading the model."""

# E experts

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from lightning_moe.files import replaced_folder
from lightning_moe.moe.block_cuts import find_cuts
from lightning_moe.moe.checkpoints import (
    load_model,
    resolve,
    skeleton,
    weight_files,
    write_model,
)
from lightning_moe.moe.decoder_layers import renumbered
from lightning_moe.moe.expert_counts import drop_settings, set_counts
from lightning_moe.moe.kept_tensors import check_types, kept_tensors, neuron_axes
from lightning_moe.moe.layer_settings import settings_without
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.merged_experts import NO_MERGE, Merge, check_merge
from lightning_moe.moe.non_uniform import COUNT_NAMES
from lightning_moe.moe.remote_code import add_modelling_file
from lightning_moe.moe.skip_tables import cut_entry, store_entry
from lightning_moe.moe.skipping import CONFIG_KEY
from lightning_moe.moe.surgery import check_keep, keep_experts
from lightning_moe.moe.weight_shards import SHARD_BYTES, write_shards

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def compact_checkpoint(
    source: str,
    keep: Mapping[str, Sequence[int]],
    target: Path,
    shard_bytes: int = SHARD_BYTES,
    skipping: Mapping[str, Any] | None = None,
    merge: Merge = NO_MERGE,
    blocks: Collection[str] = (),
) -> None:
    """Copy the checkpoint at ``source`` to ``target`` without the experts that ``keep`` does not name.

    Where it names none of a layer the MoE block goes as a whole; ``blocks`` names those whose decoder layers go. Kept
    tensors are copied bit by bit, quantised ones included; experts are numbered anew, router rows and biases
    follow. Everything else in the folder (tokenizer, generation config) travels along. The folder is complete or
    not there at all. Raises ``InputError`` before writing when the plan does not fit the model.

    ``skipping`` is what the config shall say of skipping experts (``skip_tables.config_entry``), for the experts of
    the source; it takes the place of what the source says. Its tables are cut like the rest.

    ``merge`` names dropped experts whose weights go into kept ones, see ``merged_experts``.
    """
    model = skeleton(source)
    layers = find_moe_layers(model)
    shapes = [layer.shape for layer in layers]
    check_keep(shapes, keep, blocks)
    check_merge(shapes, keep, merge)
    folder = resolve(source)
    files = weight_files(folder)
    if files[0].suffix == ".bin":  # old checkpoints: no reading by tensor, so through memory
        loaded = load_model(source)
        if skipping is not None:
            store_entry(loaded.config, skipping)
        keep_experts(loaded, keep, merge, blocks)
        with replaced_folder(target) as beside:
            copy_companions(folder, beside)
            write_model(loaded, beside)
        return
    by_index = {shape.index: (shape.num_experts, keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    dropped = [shape.index for shape in shapes if shape.name in blocks]
    settings = settings_without(model.config, dropped) if dropped else {}
    cuts = find_cuts(files, by_index)
    merging = [layer for layer in layers if layer.name in merge.groups]
    axes = neuron_axes(files, model, merging, cuts) if merge.align else {}
    merged = {
        layer.parts.index: replace(
            cuts[layer.parts.index],
            groups=merge.groups[layer.name],
            router=merge.router == "mean",
            axes=axes.get(layer.name, {}),
        )
        for layer in merging
    }
    check_types(files, merged)
    if dropped:
        drop_settings(model.config, settings, dropped)
    left = {index: ids for index, (_, ids) in by_index.items() if index not in dropped}
    set_counts(model.config, {renumbered(index, dropped): len(ids) for index, ids in left.items()})
    if skipping is not None:
        store_entry(model.config, skipping)
    cut_entry(model.config, left, dropped)
    with replaced_folder(target) as beside:
        copy_companions(folder, beside)
        write_shards(kept_tensors(files, {**cuts, **merged}, dropped), beside, shard_bytes)
        raw = json.loads((folder / "config.json").read_text())
        config = _brought_in_line(raw, model.config, type(model).__name__, settings)
        add_modelling_file(config, beside)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(folder: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation config, chat template; no weights of other formats."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith((".index.json", *WEIGHT_SUFFIXES)):
            shutil.copy(file, target)


def check_droppable(source: str, blocks: Collection[str]) -> None:
    """Raise ``InputError`` when the config at ``source`` cannot say what is left without these decoder layers."""
    if blocks:
        model = skeleton(source)
        settings_without(model.config, [one.parts.index for one in find_moe_layers(model) if one.name in blocks])


def check_mergeable(source: str, align: bool = False) -> None:
    """Raise ``InputError`` when the experts of the checkpoint at ``source`` cannot be averaged: quantised ones.

    Or, with ``align``, when it is not known where their neurons lie.
    """
    files = weight_files(resolve(source))
    if files[0].suffix == ".safetensors":
        model = skeleton(source)
        layers = find_moe_layers(model)
        cuts = find_cuts(files, {one.parts.index: (one.num_experts, range(one.num_experts)) for one in layers})
        check_types(files, cuts)
        if align:
            neuron_axes(files, model, layers, cuts)


def _brought_in_line(
    raw: dict[str, Any], config: PreTrainedConfig, type_name: str, settings: Collection[str]
) -> dict[str, Any]:
    """The config as it lay on disk, with only the counts of experts, the skip tables and ``settings`` changed."""
    holder, settled = raw.get("text_config", raw), config.get_text_config().to_dict()
    for name in ("per_layer_config", "allow_global_per_layer_attribute_access", CONFIG_KEY):
        if settled.get(name):
            holder[name] = settled[name]
        else:
            holder.pop(name, None)
    for alias, name in config.get_text_config().attribute_map.items():
        if name in COUNT_NAMES or name in settings:
            holder.pop(alias, None)  # two names for one count would contradict each other
    for name in (*COUNT_NAMES, *settings):
        if name in settings or isinstance(settled.get(name), int):
            holder[name] = settled[name]
    if "output_router_logits" in holder:
        holder["output_router_logits"] = settled.get("output_router_logits", False)
    if not raw.get("architectures"):
        raw["architectures"] = [type_name]
    return raw
