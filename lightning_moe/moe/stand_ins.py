"""Stand-ins: modules in the places of decoder layers, while a model's own forward runs through all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """In the place of a decoder layer, whose attributes it has: models ask their layers for their kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


@contextmanager
def standing_in(layers: nn.ModuleList, others: Mapping[int, nn.Module]) -> Iterator[None]:
    """Inside the context ``others`` are run in these places of the list."""
    stock = {number: layers[number] for number in others}
    for number, other in others.items():
        layers[number] = other
    try:
        yield
    finally:
        for number, layer in stock.items():
            layers[number] = layer
