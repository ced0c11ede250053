"""Layer settings: what a config says of its decoder layers one by one, brought in line when some are dropped."""

# L decoder layers

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_moe.errors import InputError, first_line
from lightning_moe.moe.checkpoints import new_model
from lightning_moe.moe.decoder_layers import LENGTH_NAME, NUMBER_NAMES, decoder_layers, decoder_path, renumbered
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skipping import CONFIG_KEY

FIRSTS = ("first_k_dense_replace", "moe_layer_start_index", "max_window_layers")
"""Settings that name the first layer of a kind."""

LASTS = ("moe_layer_end_index",)
"""Settings that name the last layer of a kind."""

STEP, DENSE = "decoder_sparse_step", "mlp_only_layers"
"""Every how many layers there are experts, and the layers that have none all the same."""

PATTERN = re.compile(r"period|offset|interval|step|freq|pattern|stride")
"""In the names of settings that say by a rule which layers are of which kind."""

Facts = dict[str, tuple[str, dict[str, Any], list[tuple[str, torch.Size]]]]
"""Of each module, by path: its type, its plain settings, its own tensors."""


def settings_without(config: PreTrainedConfig, dropped: Collection[int]) -> dict[str, Any]:
    """What settings of ``config`` become when the decoder layers ``dropped`` are gone, by name; others stay.

    Lists of one entry a layer are cut, lists of layers' numbers and the numbers of first and last layers follow. Then
    a model of the new config is built without weights and compared, module by module, with what should be left of
    one of the old. Raises ``InputError`` where they differ: a rule over all layers (every second one has experts) need
    not hold for those that are left.
    """
    plain = _without_counts(config)
    model = _blank(plain)
    path, layers = decoder_path(model), decoder_layers(model)
    with_experts = {layer.parts.index for layer in find_moe_layers(model)}
    text, length = plain.get_text_config(), len(layers)
    changed = _changed(text, length, dropped, with_experts)
    for name, value in changed.items():
        setattr(text, name, value)
    try:
        cut: Facts | str = _facts(_blank(type(plain).from_dict(plain.to_dict())), path)
    except Exception as error:  # whatever a model's own code says of numbers that do not fit each other
        cut = first_line(error)
    difference = cut if isinstance(cut, str) else _difference(_facts(model, path, dropped), cut)
    if difference is None:
        return changed
    rules = [f"{name}={value}" for name, value in vars(text).items() if type(value) is int and PATTERN.search(name)]
    told = f" by {', '.join(rules)}" if rules else ""
    numbers = ", ".join(map(str, sorted(dropped)))
    raise InputError(
        f"the config cannot say{told} what this model is without decoder layers {numbers} ({difference}); drop other "
        "layers, or their MoE blocks alone (layer-drop)."
    )


def _without_counts(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy in which all MoE layers are alike and none skips: these follow by themselves."""
    plain = copy.deepcopy(config)
    text = plain.get_text_config()
    text.per_layer_config = None
    vars(text).pop(CONFIG_KEY, None)
    return plain


def _blank(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return new_model(copy.deepcopy(config))


def _changed(
    text: PreTrainedConfig, length: int, dropped: Collection[int], with_experts: Collection[int]
) -> dict[str, Any]:
    kept = [index for index in range(length) if index not in dropped]
    length_name = text.attribute_map.get(LENGTH_NAME, LENGTH_NAME)
    common = vars(PreTrainedConfig()).keys()
    changed: dict[str, Any] = {}
    for name, value in vars(text).items():
        if name in common or "token" in name or name.startswith("_"):
            continue
        new: Any = value
        if isinstance(value, list | tuple):
            if "layer" in name and _numbers_layers(value, length):
                new = [renumbered(index, dropped) for index in value if index not in dropped]
            elif len(value) == length:
                new = [value[index] for index in kept]
        elif name == length_name:
            new = len(kept)
        elif type(value) is int and name in FIRSTS and value <= length:
            new = renumbered(value, dropped)
        elif type(value) is int and name in LASTS and 0 <= value < length:
            new = renumbered(value + 1, dropped) - 1
        if new != value:
            changed[name] = type(value)(new)
    if (getattr(text, STEP, None) or 1) > 1 and hasattr(text, DENSE):
        dense = [renumbered(index, dropped) for index in kept if index not in with_experts]
        changed |= {STEP: 1, DENSE: dense}
    return changed


def _numbers_layers(value: Sequence[Any], length: int) -> bool:
    whole = all(type(one) is int for one in value)
    return whole and list(value) == sorted(set(value)) and all(0 <= one < length for one in value)


def _facts(model: nn.Module, path: str, dropped: Collection[int] = ()) -> Facts:
    """Of the model as it would be without the decoder layers ``dropped``; ``path`` is that of their list."""
    layer_path = re.compile(rf"^{re.escape(path)}\.(\d+)(?=\.|$)")
    length = sum(1 for _ in model.get_submodule(path).children())
    facts: Facts = {}
    for name, module in model.named_modules():
        layer = layer_path.match(name)
        if layer is not None:
            if int(layer[1]) in dropped:
                continue
            name = f"{path}.{renumbered(int(layer[1]), dropped)}{name[layer.end() :]}"
        settings = {one: value for one, value in vars(module).items() if type(value) in (str, bool, int, float)}
        for one in NUMBER_NAMES:
            if layer is not None and settings.get(one) == int(layer[1]):
                settings[one] = renumbered(int(layer[1]), dropped)
        if settings.get(LENGTH_NAME) == length:
            settings[LENGTH_NAME] = length - len(dropped)
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        facts[name] = type(module).__name__, settings, [(one, tensor.shape) for one, tensor in tensors]
    return facts


def _difference(wanted: Facts, found: Facts) -> str | None:
    """The first module in which they differ, and how; None where they do not."""
    for name, (kind, settings, tensors) in wanted.items():
        if name not in found:
            return f"{name} would be missing"
        other_kind, other_settings, other_tensors = found[name]
        if kind != other_kind:
            return f"{name} would be a {other_kind} in place of a {kind}"
        for one in settings.keys() | other_settings.keys():
            if settings.get(one) != other_settings.get(one):
                return f"{name}.{one} would be {other_settings.get(one)} in place of {settings.get(one)}"
        if tensors != other_tensors:
            return f"the tensors of {name} would be of other shapes"
    more = found.keys() - wanted.keys()
    return f"{min(more)} would be there too" if more else None
