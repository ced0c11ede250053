"""What skipping and merging need of a layer: how its experts' weights compare, how alike their outputs are."""

# E experts, R bins of a ratio in [0, 1]

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.skip_tables import SkipTable
from lightning_moe.stats.layer_stats import LayerStats


def gamma1(stats: LayerStats) -> float:
    """Median over tokens of the second largest routing weight over the largest, to a bin's width (DiEP, eq. 12).

    0, which skips nothing, where tokens have one expert only.
    """
    count_R = stats.ratio_R
    half = float(count_R.sum()) / 2
    if not half:
        return 0.0
    below_R = count_R.cumsum(0)
    place = int((below_R < half).sum())
    inside = (half - float(below_R[place] - count_R[place])) / float(count_R[place])
    return (place + inside) / count_R.shape[0]


def similarity(stats: LayerStats) -> Tensor:
    """CKA between the outputs of every pair of experts, ``(E, E)`` in [0, 1], with 1 on the diagonal.

    A pair that never shared enough tokens gets the mean of the layer's other pairs, or 1 when there is none.
    """
    return _cka(stats).fill_diagonal_(1.0)


def measured_pairs(stats: LayerStats) -> Tensor:
    """Which pairs shared enough tokens for their CKA to be known, ``(E, E)`` bool; an expert with itself did."""
    return (_scale(stats) > 0).fill_diagonal_(True)


def router_similarity(stats: LayerStats) -> Tensor:
    """Cosine between the router's logits of every pair of experts, over all tokens, ``(E, E)``; 1 on the diagonal.

    It is what M-SMoE (arXiv 2310.01334) groups experts by. Raises ``InputError`` for statistics of an older version,
    which did not keep what it takes.
    """
    product_EE = stats.logit_products_EE
    if bool(product_EE.isnan().any()):
        raise InputError(
            "these statistics are of an older version and know no router logits; score again (--overwrite)."
        )
    norm_E = product_EE.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return (product_EE / (norm_E[:, None] * norm_E)).fill_diagonal_(1.0)


def gamma2(stats: LayerStats) -> Tensor:
    """CKA of each pair over the mean of the layer's pairs, ``(E, E)``; 1 on the diagonal (DiEP, eq. 12)."""
    cka_EE, num_experts = _cka(stats), stats.hsic_EE.shape[0]
    pairs = ~torch.eye(num_experts, dtype=torch.bool)
    mean = float(cka_EE[pairs].mean()) if num_experts > 1 else 0.0
    return (cka_EE / mean if mean else torch.ones_like(cka_EE)).fill_diagonal_(1.0)


def skip_tables(layers: Sequence[LayerStats]) -> dict[int, SkipTable]:
    """The skip table of each layer, by decoder layer."""
    return {stats.shape.index: SkipTable(gamma1(stats), gamma2(stats)) for stats in layers}


def _cka(stats: LayerStats) -> Tensor:
    scale_EE = _scale(stats)
    known_EE = scale_EE > 0
    cka_EE = (stats.hsic_EE / scale_EE.masked_fill(~known_EE, 1.0)).clamp(0.0, 1.0)
    mean = float(cka_EE[known_EE].mean()) if bool(known_EE.any()) else 1.0
    return cka_EE.masked_fill(~known_EE, mean)


def _scale(stats: LayerStats) -> Tensor:
    """What CKA divides by, ``(E, E)``: 0 for a pair that never shared enough tokens, and on the diagonal."""
    return (stats.own_hsic_EE * stats.own_hsic_EE.T).sqrt()
