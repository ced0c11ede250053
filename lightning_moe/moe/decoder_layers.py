"""Decoder layers: the list in a model that holds its MoE blocks, and taking some of them out."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from lightning_moe.moe.layers import find_moe_layers

NUMBER_NAMES = ("layer_idx", "layer_id", "layer_index")
"""Under which a module of a decoder layer knows the number of its layer: its place in the cache."""

LENGTH_NAME = "num_hidden_layers"
"""Under which configs, and a few modules, have the number of decoder layers."""


def decoder_of(model: nn.Module, name: str) -> nn.Module:
    """The decoder layer that holds the MoE block called ``name``."""
    path, number = _place(name)
    return model.get_submodule(f"{path}.{number}")


def decoder_path(model: nn.Module) -> str:
    """Where the list of decoder layers is in a model: the one that holds the MoE blocks."""
    path, _ = _place(find_moe_layers(model)[0].name)
    return path


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, dense layers too."""
    path = decoder_path(model)
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList), f"{path} is no list of layers"
    return layers


def _place(name: str) -> tuple[str, int]:
    place = re.match(r"(.*?)\.(\d+)(\.|$)", name)
    assert place is not None, f"{name} is in no list of layers"
    return place[1], int(place[2])


def renumbered(index: int, dropped: Collection[int]) -> int:
    """The number of a decoder layer that stays, when those before it that are dropped are gone."""
    return index - sum(one < index for one in dropped)


def drop_decoder_layers(model: nn.Module, dropped: Collection[int]) -> None:
    """Take decoder layers out of ``model`` and tell the others their new numbers; the config is left as it is."""
    layers = decoder_layers(model)
    length = len(layers)
    for index in sorted(dropped, reverse=True):
        del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            for name in NUMBER_NAMES:
                if type(vars(module).get(name)) is int:
                    setattr(module, name, index)
    for module in model.modules():
        if vars(module).get(LENGTH_NAME) == length:
            setattr(module, LENGTH_NAME, len(layers))
