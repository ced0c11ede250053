"""Weights: every parameter of a model, where it belongs, and how much of it one of several ranks holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.non_uniform import stacked_parameters


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    layer: int | None
    """Number of the decoder layer it belongs to; None for the embedding, the last norm, the output head."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    routed: float = 1.0
    """Fraction of it that works on one token: ``top_k / E`` for the stacks of experts."""
    split: bool = True
    """Whether moe_fsdp splits it over ranks; routers, norms and biases are on every rank."""
    stack: bool = False
    """Whether it is a stack of experts."""
    made: int | None = None
    """Place in the order in which a layer's stacks are made, of experts that lie on disk one by one; else None."""
    looked_up: bool = False
    """Whether tokens pick rows of it and it multiplies nothing: the embedding, unless it is the output head too."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def split_dimension(self, ranks: int) -> int:
        """Along which dimension so many ranks split it: the first that they divide evenly, or unevenly the first."""
        return next((place for place, size in enumerate(self.shape) if size % ranks == 0), 0)

    def on_rank(self, ranks: int) -> int:
        """Numbers on the rank that holds most, of so many that share one copy of the model."""
        if ranks == 1 or not self.split:
            return self.numel
        size = self.shape[self.split_dimension(ranks)]
        return self.numel // size * -(-size // ranks)


def weights_of(model: PreTrainedModel) -> list[Weight]:
    """All parameters of a model, a shared one once."""
    moe_layers = find_moe_layers(model)
    routers = {id(parameter) for layer in moe_layers for parameter in layer.router.parameters()}
    routed = {
        id(stack): layer.top_k / layer.num_experts
        for layer in moe_layers
        for stack in stacked_parameters(layer.experts).values()
    }
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    tied = isinstance(head, nn.Module) and any(p is embedding.weight for p in head.parameters())
    number_of = {id(p): index for index, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    made = _making_order(model)
    return [
        Weight(
            name,
            number_of.get(id(parameter)),
            tuple(parameter.shape),
            parameter.dtype,
            min(1.0, routed.get(id(parameter), 1.0)),
            parameter.dim() >= 2 and id(parameter) not in routers,
            id(parameter) in routed,
            made.get(name.rpartition(".")[2]) if id(parameter) in routed else None,
            parameter is embedding.weight and not tied,
        )
        for name, parameter in model.named_parameters()
    ]


def _making_order(model: PreTrainedModel) -> dict[str, int]:
    """Stacks by name, numbered as transformers makes them: by the name of their first piece on disk."""
    stacks: list[tuple[str, str]] = []
    for one in cast("Any", get_model_conversion_mapping(model)):
        if any(".*." in source for source in one.source_patterns):
            first = min(source.rpartition(".*.")[2] for source in one.source_patterns)
            stacks += [(first, target.rpartition(".")[2]) for target in one.target_patterns]
    return {target: number for number, (_, target) in enumerate(sorted(stacks))}


def total_parameters(weights: Iterable[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def active_parameters(weights: Iterable[Weight]) -> int:
    """Parameters that work on one token: everything, but of the experts only those its router picks."""
    return round(sum(weight.numel * weight.routed for weight in weights))


def readable_count(parameters: int) -> str:
    """Rounded, in the unit that suits: ``46.7B``, ``7.3M``, ``12.0K``, ``950``."""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size * 0.99995:  # what rounds to 1000.0 of the unit below
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)
