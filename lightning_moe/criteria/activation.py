"""Activation criteria: what the experts put out (MC-Suite, REAP, MAN). ``f`` is an output before its weight."""

# E experts, H model width

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.criteria.registry import register
from lightning_moe.stats.layer_stats import LayerStats

SMALLEST_STD = 1e-12
"""Stands for the spread of an output that never varies, as that of an expert with one token."""


@register("eas", drops="max")
def expert_activation_similarity(stats: LayerStats) -> Tensor:
    """Mean cosine between the outputs of an expert and those of each other one, summed over the others (EAS).

    The mean cosine over all pairs of outputs is the dot product of the mean unit vectors.
    """
    mean_unit_EH = stats.unit_sum_EH / _at_least_one(stats.count_E)[:, None]
    cosine_EE = mean_unit_EH @ mean_unit_EH.T
    return cosine_EE.sum(1) - cosine_EE.diagonal()


@register("eae", drops="min")
def expert_activation_entropy(stats: LayerStats) -> Tensor:
    """Sum over dimensions of the log of the standard deviation over tokens (EAE)."""
    count_E1 = _at_least_one(stats.count_E)[:, None]
    mean_EH = stats.output_sum_EH / count_E1
    variance_EH = (stats.output_sq_EH / count_E1 - mean_EH.square()).clamp(min=SMALLEST_STD**2)
    return variance_EH.log().sum(1) / 2


@register("eao", drops="min")
def expert_activation_outliers(stats: LayerStats) -> Tensor:
    """Output entries beyond 3 standard deviations of their own output (EAO); the end dropped is our choice."""
    return stats.outliers_E


@register("ean", drops="min")
def expert_activation_norm(stats: LayerStats) -> Tensor:
    """Norm over tokens of each output dimension, summed over dimensions (EAN): the paper's best."""
    return stats.output_sq_EH.sqrt().sum(1)


@register("reap", drops="min")
def router_weighted_activation(stats: LayerStats) -> Tensor:
    """Mean of routing weight times output norm over routed tokens (REAP, arXiv 2510.13999)."""
    return stats.gated_norm_E / _at_least_one(stats.count_E)


@register("reap-sum", drops="min")
def router_weighted_activation_sum(stats: LayerStats) -> Tensor:
    """REAP summed over routed tokens in place of the mean: often used experts count for more."""
    return stats.gated_norm_E


@register("man", drops="min")
def mean_activation_norm(stats: LayerStats) -> Tensor:
    """Mean output norm over routed tokens (MAN, arXiv 2606.15716)."""
    return stats.norm_E / _at_least_one(stats.count_E)


@register("msan", drops="min")
def mean_square_activation_norm(stats: LayerStats) -> Tensor:
    """Mean squared output norm over routed tokens (MSAN, arXiv 2606.15716)."""
    return stats.norm_sq_E / _at_least_one(stats.count_E)


def _at_least_one(count_E: Tensor) -> Tensor:
    """A divisor: an unused expert's sums are 0, and 0 is its mean."""
    return torch.clamp(count_E, min=1)
