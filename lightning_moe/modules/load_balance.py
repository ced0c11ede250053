"""The load-balance loss, for any mix of expert counts."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_moe.moe.routing import Routing


def load_balance_loss(routings: Sequence[Routing], mask_T: Tensor | None = None) -> Tensor:
    """Mean over layers of ``E * sum_i f_i * p_i``, 1 when all is even (Switch Transformer, eq. 4-6).

    ``f_i`` is the share of assignments that expert ``i`` got, ``p_i`` its mean softmax probability. Every layer
    uses its own ``E``, so layers with different counts weigh the same. ``mask_T`` is 0 at padding.
    """
    losses = []
    for routing in routings:
        probability_TE = routing.logits_TE.float().softmax(-1)
        num_experts = probability_TE.shape[-1]
        weight_T = torch.ones_like(probability_TE[:, 0]) if mask_T is None else mask_T.to(probability_TE)
        chosen_E = probability_TE.new_zeros(num_experts).index_add(
            0, routing.expert_ids_TK.flatten(), weight_T.repeat_interleave(routing.expert_ids_TK.shape[-1])
        )
        share_E = chosen_E / chosen_E.sum().clamp(min=1)
        mean_E = weight_T @ probability_TE / weight_T.sum().clamp(min=1)
        losses.append(num_experts * (share_E * mean_E).sum())
    return torch.stack(losses).mean()
