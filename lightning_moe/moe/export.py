"""Export: a checkpoint of a model in memory, by all ranks together, one decoder layer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_moe.files import replaced_folder
from lightning_moe.moe.checkpoints import load_tokenizer, save_model
from lightning_moe.moe.expert_counts import set_counts
from lightning_moe.moe.layers import check_unpacked, find_moe_layers
from lightning_moe.moe.non_uniform import per_expert_tensors
from lightning_moe.moe.ranks import num_ranks, rank
from lightning_moe.moe.remote_code import add_modelling_file
from lightning_moe.moe.skip_tables import cut_entry, stored_entry
from lightning_moe.moe.split_tensors import is_sharded, whole
from lightning_moe.moe.weight_shards import LAYER, write_shards


def export_model(model: PreTrainedModel, target: Path, tokenizer: str | None = None, dtype: str | None = None) -> None:
    """What ``save_model`` does, called by all ranks; rank 0 writes, and the folder is there when it returns.

    A model that is split is gathered one decoder layer at a time, for rank 0 to write. Experts that are masked out
    are left out.
    """
    layers = find_moe_layers(model)
    check_unpacked(model, "saved")
    if is_sharded(model) or any(layer.kept is not None for layer in layers):
        _export_by_layer(model, target, tokenizer, dtype)
    elif rank() == 0:
        save_model(model, target, tokenizer, dtype)
    if num_ranks() > 1:
        torch.distributed.barrier()


def _export_by_layer(model: PreTrainedModel, target: Path, tokenizer: str | None, dtype: str | None) -> None:
    layers = find_moe_layers(model)
    keep = {layer.name: layer.kept for layer in layers if layer.kept is not None}
    tensors = _stored_tensors(model, keep, None if dtype is None else getattr(torch, dtype))
    if rank() != 0:
        for _ in tensors:  # each is gathered from all
            pass
        return
    with replaced_folder(target) as folder:
        write_shards(tensors, folder)
        config = copy.deepcopy(model.config)
        set_counts(config, {one.parts.index: one.shape.num_experts for one in layers})
        if stored_entry(config) is not None:
            cut_entry(config, {one.parts.index: keep[one.name] for one in layers if one.name in keep})
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = model.dtype if dtype is None else getattr(torch, dtype)
        config.save_pretrained(folder)
        raw = json.loads((folder / "config.json").read_text())
        add_modelling_file(raw, folder)
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(folder)


def _stored_tensors(
    model: PreTrainedModel, keep: Mapping[str, Sequence[int]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is called and shaped on disk; empty on other ranks than 0, which only help to gather."""
    cuts = _cuts(model, keep)
    kinds = {} if dtype is None else model._get_dtype_plan(dtype)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not _is_tied(model, name):
            found = LAYER.search(name)
            groups.setdefault(found.group(1) if found else name, {})[name] = tensor
    for group in groups.values():
        gathered: dict[str, Tensor] = {}
        for name, tensor in group.items():
            full = whole(tensor)
            if rank() != 0:
                continue
            if name in cuts:
                dimension, ids = cuts[name]
                full = full.index_select(dimension, torch.tensor(list(ids), device=full.device))
            if dtype is not None and full.is_floating_point():
                full = full.to(next((kind for part, kind in kinds.items() if part in name), dtype))
            gathered[name] = full.cpu()
        yield from revert_weight_conversion(model, gathered).items()


def _cuts(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, Sequence[int]]]:
    """Tensors that hold a slice for each expert, by name: along which dimension, and the slices that stay."""
    paths = {id(module): name for name, module in model.named_modules()}
    cuts = {}
    for layer in find_moe_layers(model):
        if layer.name in keep:
            for owner, name, _, dimension in per_expert_tensors(layer.parts):
                cuts[f"{paths[id(owner)]}.{name}"] = dimension, keep[layer.name]
    return cuts


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is another one under a second name, which a checkpoint leaves out."""
    source = model.all_tied_weights_keys.get(name)
    with suppress(AttributeError):
        return source is not None and model.get_parameter(name) is model.get_parameter(source)
    return False
