"""Loading a checkpoint into a split model: every rank holds its own part, and one decoder layer at a time."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from lightning_moe.errors import UNREADABLE, InputError, first_line
from lightning_moe.moe.checkpoints import all_finite, new_model, read_config, resolve, weight_files
from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.weight_shards import LAYER

Stored = Mapping[str, Any]
"""Tensors of a checkpoint by name, read when they are sliced."""


def load_sharded(
    path: str, sharding: Sharding, dtype: str = "auto", prepare: Callable[[MoELayer], None] | None = None
) -> PreTrainedModel:
    """Load a causal language model, split over ranks; every rank must call it. Raises ``InputError``.

    ``prepare`` may change the experts of a layer while they are there as a whole, before they are split.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None):
        raise InputError(f"--model.path {path}: quantised already, and such a checkpoint cannot be split over ranks.")
    with _opened(weight_files(resolve(path))) as stored:
        kind = _dtype(dtype, config.dtype, stored)
        with torch.device("meta"):
            model = new_model(config, kind)
        loading = LoadStateDictConfig(
            pretrained_model_name_or_path=path,
            dtype=kind,
            dtype_plan=model._get_dtype_plan(kind),
            weight_mapping=cast("Any", get_model_conversion_mapping(model)),
        )
        moe_layers, layers = find_moe_layers(model), decoder_layers(model)
        routers = [layer.router for layer in moe_layers]
        names = _by_layer(stored, range(len(layers)))
        for index, layer in enumerate(layers):
            _fill(model, layer, {name: stored[name] for name in names.get(index, ())}, loading, path)
            _check_there([name for name, tensor in _named(model, layer) if tensor.is_meta], path)
            if prepare is not None:
                for one in moe_layers:
                    if one.parts.index == index:
                        prepare(one)
            sharding.shard_layer(layer, routers)
            for tensor in (*layer.parameters(), *layer.buffers()):
                vars(tensor)["_is_hf_initialized"] = True  # the weights are; these objects are new
            _give_back()
        info = _fill(model, model, {name: stored[name] for name in names[None]}, loading, path)
    info.missing_keys = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    info = PreTrainedModel._finalize_model_loading(model, loading, info)
    _check_there(info.missing_keys, path)
    sharding.shard_rest(model, routers)
    model.eval()
    return model


def _dtype(asked: str, configured: torch.dtype | None, stored: Stored) -> torch.dtype:
    if asked != "auto":
        kind: torch.dtype = getattr(torch, asked)
        return kind
    if configured is not None:
        return configured
    kinds = (tensor[...].dtype for tensor in stored.values())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _by_layer(stored: Stored, layers: Collection[int]) -> dict[int | None, list[str]]:
    """Names on disk by the decoder layer they belong to, None for what belongs to none."""
    names: dict[int | None, list[str]] = {None: []}
    for name in stored:
        found = LAYER.search(name)
        index = int(found.group(1)) if found and int(found.group(1)) in layers else None
        names.setdefault(index, []).append(name)
    return names


def _fill(model: PreTrainedModel, part: nn.Module, stored: Stored, loading: LoadStateDictConfig, path: str) -> Any:
    """Put stored tensors where they belong, converted as transformers does, and see that they are whole and finite."""
    try:
        info, _ = convert_and_load_state_dict_in_model(model, dict(stored), loading)
    except (*UNREADABLE, SafetensorError) as error:
        raise InputError(f"--model.path {path}: it cannot be loaded: {first_line(error)}") from error
    if info.error_msgs:
        raise InputError(f"--model.path {path}: it cannot be loaded: {first_line(ValueError(info.error_msgs[0]))}")
    for name, trace in info.conversion_errors.items():  # a traceback, what it says, and a line that starts with Error
        reason = next(line for line in reversed(trace.splitlines()) if line and not line.startswith("Error:"))
        raise InputError(f"--model.path {path}: it cannot be loaded: {name}: {reason}")
    if info.mismatched_keys:
        name, found, expected = sorted(info.mismatched_keys)[0]
        raise InputError(
            f"--model.path {path}: {name} has shape {tuple(found)}, the config says {tuple(expected)}; the checkpoint "
            "is damaged."
        )
    for name, parameter in _named(model, part):
        if not parameter.is_meta and not all_finite(parameter):
            raise InputError(
                f"--model.path {path}: {name} holds values that are not finite; the checkpoint is damaged."
            )
    return info


def _named(model: nn.Module, part: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a part of the model, by their names in the whole of it."""
    own = {id(parameter) for parameter in part.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own]


def _check_there(missing: Collection[str], path: str) -> None:
    if missing:
        raise InputError(f"--model.path {path}: {len(missing)} weights are missing, the first is {min(missing)}.")


def _give_back() -> None:
    """Let the system have what was freed: glibc keeps half a model's worth for later, where nothing comes later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _opened(files: Iterable[Path]) -> Iterator[Stored]:
    """All tensors of the files; of old formats they are mapped too, never read as a whole."""
    stored: dict[str, Any] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    tensors = stack.enter_context(safe_open(file, "pt"))
                    stored |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
                else:
                    stored |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (*UNREADABLE, SafetensorError) as error:
                raise InputError(f"{file}: cannot be read as weights ({first_line(error)}).") from error
        yield stored
