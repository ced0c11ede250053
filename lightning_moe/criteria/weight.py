"""Weight criteria of MC-Suite (arXiv 2504.05586): what the weights alone say."""

from __future__ import annotations

from torch import Tensor

from lightning_moe.criteria.registry import register
from lightning_moe.stats.layer_stats import LayerStats


@register("ews", drops="max")
def expert_weight_similarity(stats: LayerStats) -> Tensor:
    """Sum of cosines between an expert's flattened weights and those of all others (EWS)."""
    return stats.weight_cosine_EE.sum(1) - stats.weight_cosine_EE.diagonal()


@register("rwn", drops="max")
def router_weight_norm(stats: LayerStats) -> Tensor:
    """L2 norm of the router's row (RWN)."""
    return stats.router_norm_E


@register("wsr", drops="max", stable_ranks=True)
def weight_stable_rank(stats: LayerStats) -> Tensor:
    """Stable rank, mean over the expert's matrices (WSR)."""
    return stats.stable_rank_E


@register("ewn", drops="min")
def expert_weight_norm(stats: LayerStats) -> Tensor:
    """L2 norm of all weights (EWN); the paper does not say which end it drops, the least is our choice."""
    return stats.weight_norm_E
