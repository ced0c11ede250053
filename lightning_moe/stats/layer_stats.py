"""LayerStats: everything the criteria know of one MoE layer."""

# E experts, H model width, V vocabulary, R bins of a ratio in [0, 1]

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_moe.moe.layers import LayerShape


@dataclass(frozen=True)
class LayerStats:
    """Sums over calibration tokens and figures of the weights, of one layer.

    Float64 but for the token sets. A sum "over routed tokens" of expert ``i`` runs over the tokens the router
    gave to ``i``; padding never counts. ``f`` is an expert's output before its routing weight.
    """

    shape: LayerShape

    tokens: Tensor
    """Tokens seen, a scalar."""
    count_E: Tensor
    """Routed tokens."""
    probability_E: Tensor
    """Full softmax probability, over all tokens."""
    soft_count_E: Tensor
    """Full softmax probability, over routed tokens."""
    together_EE: Tensor
    """Tokens that two experts share; the diagonal is ``count_E``."""
    logit_products_EE: Tensor
    """Product of the router's logits for two experts, over all tokens; NaN where an older file did not have it."""
    seen_EV: Tensor
    """Whether an expert ever got a token id, bool."""
    norm_E: Tensor
    """``||f||`` over routed tokens."""
    norm_sq_E: Tensor
    """``||f||^2`` over routed tokens."""
    gated_norm_E: Tensor
    """``w ||f||`` over routed tokens, ``w`` renormalised over the token's experts."""
    outliers_E: Tensor
    """Entries of ``f`` further than 3 std from their mean, over the width of each output."""
    output_sum_EH: Tensor
    """``f`` over routed tokens."""
    output_sq_EH: Tensor
    """``f^2``, entry by entry."""
    unit_sum_EH: Tensor
    """``f / ||f||``."""
    ratio_R: Tensor
    """Tokens by their second largest routing weight over the largest; zeros where a token has one expert."""
    hsic_EE: Tensor
    """HSIC of the outputs of two experts, over the sequences' tokens that both see; see ``minibatch_cka``."""
    own_hsic_EE: Tensor
    """HSIC of the outputs of the first expert with themselves, on the same tokens."""
    layer_cosine: Tensor
    """Cosine between the residual stream before and after the MoE block, over all tokens, a scalar; NaN where an older
    file did not have it."""
    block_cosine: Tensor
    """The same of the whole decoder layer."""

    router_norm_E: Tensor
    """L2 norm of the router's row."""
    weight_norm_E: Tensor
    """L2 norm of all weights of the expert."""
    weight_cosine_EE: Tensor
    """Cosine between the flattened weights of two experts."""
    stable_rank_E: Tensor
    """``sum sigma^2 / sigma_max^2``, mean over the expert's matrices."""

    gradient_cosine_EE: Tensor | None = None
    """Cosine between the flattened gradients of two experts; like those below, see ``stats.gradients``."""
    gradient_log_std_E: Tensor | None = None
    """Log of the standard deviation of the gradient over the expert's neurons, summed over dimensions."""
    gradient_outliers_E: Tensor | None = None
    """Entries of the gradient further than 3 std from their mean, over the dimensions of each neuron."""
    gradient_norm_E: Tensor | None = None
    """L2 norm of the gradient over the expert's neurons, summed over dimensions."""

    @property
    def has_gradients(self) -> bool:
        """Whether the figures of gradients are there: they need a backward pass, made when somebody asks."""
        return all(getattr(self, name) is not None for name in GRADIENTS)

    def only(self, experts: Sequence[int]) -> LayerStats:
        """The statistics of these experts, as if the others, which no token was sent to, did not exist."""
        there = (*TENSORS, *(GRADIENTS if self.has_gradients else ()))
        cut = only_experts({name: getattr(self, name) for name in there}, experts)
        return replace(self, shape=replace(self.shape, num_experts=len(experts)), **cut)


def only_experts(tensors: Mapping[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor]:
    """The same tensors with these experts alone; a name says by its suffix which dimensions are of experts."""
    ids, cut = torch.tensor(experts), dict(tensors)
    for name in tensors:
        for dimension, what in enumerate(name.rpartition("_")[2] if "_" in name else ""):
            cut[name] = cut[name].index_select(dimension, ids) if what == "E" else cut[name]
    return cut


TENSORS = tuple(field.name for field in fields(LayerStats) if field.type == "Tensor")
"""The names of the tensors that every ``LayerStats`` has."""

GRADIENTS = tuple(field.name for field in fields(LayerStats) if field.type == "Tensor | None")
"""The names of those that it has when a backward pass was made: all or none."""
