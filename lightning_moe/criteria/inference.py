"""Inference criteria: what the router does on calibration text (MC-Suite, SEER-MoE, Expert Trimming)."""

from __future__ import annotations

from torch import Tensor

from lightning_moe.criteria.registry import register, register_pairs
from lightning_moe.stats.layer_stats import LayerStats


@register("euf", drops="min")
def expert_usage_frequency(stats: LayerStats) -> Tensor:
    """Tokens routed to the expert (EUF; SEER-MoE's hard count)."""
    return stats.count_E


@register_pairs("ecc", drops="max")
def expert_coactivation(stats: LayerStats) -> Tensor:
    """Tokens that two experts share; of the extreme pair the less used is dropped (ECC)."""
    return stats.together_EE


@register("evc", drops="min")
def expert_vocabulary_coverage(stats: LayerStats) -> Tensor:
    """Share of the vocabulary that ever reached the expert (EVC)."""
    return stats.seen_EV.double().mean(1)


@register_pairs("ets", drops="max")
def expert_token_similarity(stats: LayerStats) -> Tensor:
    """Token ids that two experts have both seen; of the extreme pair the less used is dropped (ETS)."""
    seen_EV = stats.seen_EV.float()  # counts stay below 2^24, exact in float32
    return seen_EV @ seen_EV.T


@register("seer", drops="min")
def soft_count(stats: LayerStats) -> Tensor:
    """Softmax probability summed over the tokens routed to the expert (SEER-MoE, arXiv 2404.05089, soft)."""
    return stats.soft_count_E


@register("trimming", drops="min")
def mean_probability(stats: LayerStats) -> Tensor:
    """Mean softmax probability over all tokens (Expert Trimming, arXiv 2406.02500)."""
    return stats.probability_E / stats.tokens.clamp(min=1)
