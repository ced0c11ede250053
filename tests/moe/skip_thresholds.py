"""Tables of thresholds by which the tiny models skip experts."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import SkipTable


def tables_of(model: PreTrainedModel, gamma1: float = 0.7, seed: int = 0) -> dict[int, SkipTable]:
    """Symmetric tables around 1, with pairs whose threshold is above 1."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for layer in find_moe_layers(model):
        half = torch.rand(layer.num_experts, layer.num_experts, generator=generator)
        tables[layer.parts.index] = SkipTable(gamma1, (half + half.T).round(decimals=4))
    return tables
