"""What happens at a layer by chance, its statistics by the slow reference, and how near scores of it must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_moe.moe.layers import LayerShape
from lightning_moe.stats.layer_stats import GRADIENTS, TENSORS, LayerStats
from tests.helpers.reference.gradients import gradient_stats
from tests.helpers.reference.raw_layers import RawLayer, SeenToken, Visit
from tests.helpers.reference.statistics import layer_stats, weight_stats
from tests.helpers.reference.vectors import softmax

ALL = (*TENSORS, *GRADIENTS)
WIDTH, VOCAB = 12, 30


def random_layer(seed: int, num_experts: int = 6, num_tokens: int = 40, top_k: int = 2) -> RawLayer:
    """A layer whose experts are used unevenly; outputs have a direction and a size of their own per expert."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    liked, centres, sizes = normal(num_experts) / 2, normal(num_experts, WIDTH), normal(num_experts).exp()
    tokens = []
    for _ in range(num_tokens):
        probabilities = softmax((liked + normal(num_experts)).tolist())
        chosen = sorted(range(num_experts), key=lambda expert: -probabilities[expert])[:top_k]
        token_id = int(torch.randint(0, VOCAB, (), generator=generator))
        visits = []
        for expert in chosen:
            output = sizes[expert] * (centres[expert] + normal(WIDTH) ** 3)
            visits.append(Visit(expert, probabilities[expert], output.float().tolist()))
        tokens.append(SeenToken(token_id, probabilities, visits))
    shared = normal(5, 7)
    matrices = [[shared + normal(5, 7), normal(7, 5)] for _ in range(num_experts)]
    rows = normal(num_experts, 9).tolist()
    gradients = [
        [size * (centre + normal(5, WIDTH) ** 3), size * normal(5, WIDTH) ** 5]
        for size, centre in zip(sizes, centres, strict=True)
    ]
    return RawLayer(num_experts, VOCAB, tokens, rows, matrices, gradients)


def stats_of(raw: RawLayer, index: int = 0) -> LayerStats:
    values = layer_stats(raw) | weight_stats(raw) | gradient_stats(raw)
    tensors: dict[str, Any] = {
        name: torch.tensor(values[name], dtype=torch.bool if name == "seen_EV" else torch.float64) for name in ALL
    }
    shape = LayerShape(f"model.layers.{index}.mlp", index, raw.num_experts, len(raw.tokens[0].visits))
    return LayerStats(shape, **tensors)


def permuted(stats: LayerStats, order: Sequence[int]) -> LayerStats:
    """The statistics if expert ``order[i]`` had been number ``i``."""
    moved: dict[str, Any] = {}
    for name in ALL:
        value = getattr(stats, name)
        if name.endswith("_EE"):
            moved[name] = value[order][:, order]
        elif "_E" in name:
            moved[name] = value[order]
    return replace(stats, **moved)


def likeness(num_experts: int, seed: int) -> Tensor:
    alike_EE = torch.rand(num_experts, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((alike_EE + alike_EE.T) / 2).fill_diagonal_(1.0)


def assert_scores(found: Tensor, expected: Sequence[float]) -> None:
    assert found.dtype == torch.float64 and found.shape == (len(expected),)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-6)
