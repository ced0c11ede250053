"""Gradient criteria of MC-Suite (arXiv 2504.05586): what the summed gradient of the next-token loss says.

The four measures of activations, taken of weight gradients instead. Where activations have tokens a gradient has the
expert's hidden neurons, and for output dimensions it has the model's width; ``stats.gradients`` says how.
"""

# E experts

from __future__ import annotations

from torch import Tensor

from lightning_moe.criteria.registry import register
from lightning_moe.stats.layer_stats import LayerStats


@register("egs", drops="max", gradients=True)
def expert_gradient_similarity(stats: LayerStats) -> Tensor:
    """Sum of cosines between an expert's flattened gradient and those of all others (EGS); the end is our choice."""
    cosine_EE = _made(stats.gradient_cosine_EE)
    return cosine_EE.sum(1) - cosine_EE.diagonal()


@register("ege", drops="min", gradients=True)
def expert_gradient_entropy(stats: LayerStats) -> Tensor:
    """Sum over dimensions of the log of the gradient's standard deviation over neurons (EGE): one of its best two."""
    return _made(stats.gradient_log_std_E)


@register("ego", drops="min", gradients=True)
def expert_gradient_outliers(stats: LayerStats) -> Tensor:
    """Gradient entries beyond 3 standard deviations of their own neuron (EGO); the end dropped is our choice."""
    return _made(stats.gradient_outliers_E)


@register("egn", drops="min", gradients=True)
def expert_gradient_norm(stats: LayerStats) -> Tensor:
    """Gradient norm over neurons of each dimension, summed over dimensions (EGN); the end dropped is our choice."""
    return _made(stats.gradient_norm_E)


def _made(figure: Tensor | None) -> Tensor:
    assert figure is not None, "statistics without gradients are refused before"
    return figure
