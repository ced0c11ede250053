"""Losses on a router's logits, and a way to train with them whatever the loss of the model is."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_moe.moe.routing import Routing


def load_balance_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """``E * sum_i f_i * p_i`` of one layer, 1 when all is even (Switch Transformer, eq. 4-6).

    ``f_i`` is the share of assignments that expert ``i`` got, ``p_i`` its mean softmax probability. With its own
    ``E`` in it, the loss weighs layers of different counts the same. ``mask_T`` is 0 at padding.
    """
    probability_TE = routing.logits_TE.float().softmax(-1)
    weight_T = _weights(probability_TE, mask_T)
    chosen_E = probability_TE.new_zeros(probability_TE.shape[-1]).index_add(
        0, routing.expert_ids_TK.flatten(), weight_T.repeat_interleave(routing.expert_ids_TK.shape[-1])
    )
    share_E = chosen_E / chosen_E.sum().clamp(min=1)
    mean_E = (weight_T[:, None] * probability_TE).sum(0) / weight_T.sum().clamp(min=1)
    return _left(routing) * (share_E * mean_E).sum()


def router_z_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits, which keeps them small (ST-MoE, eq. 5)."""
    square_T = routing.logits_TE.float().logsumexp(-1).square()
    weight_T = _weights(square_T, mask_T)
    return (weight_T * square_T).sum() / weight_T.sum().clamp(min=1)


def gate_entropy_loss(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of the entropy of the logits' softmax, over the log of the number of experts (after SEER-MoE).

    1 where the router likes all experts alike, 0 where it is sure of one: so it weighs layers of different counts the
    same, and one weight suits models of any. Without that division it would be in nats. Of a single expert it is 0. The
    softmax is over all experts, also where the router weighs by a sigmoid, or those it has chosen alone.
    """
    logits_TE = routing.logits_TE.float()
    # Masked experts have probability 0 and a log of -inf, whose product, and its gradient, are not numbers.
    log_TE = logits_TE.log_softmax(-1).masked_fill(logits_TE == -torch.inf, 0.0)
    entropy_T = -(logits_TE.softmax(-1) * log_TE).sum(-1)
    weight_T = _weights(entropy_T, mask_T)
    return (weight_T * entropy_T).sum() / weight_T.sum().clamp(min=1) / _left(routing).clamp(min=2).log()


def _left(routing: Routing) -> Tensor:
    """Experts that are not masked out."""
    return (routing.logits_TE > -torch.inf).any(0).sum()


def _weights(like: Tensor, mask_T: Tensor | None) -> Tensor:
    return like.new_ones(like.shape[0]) if mask_T is None else mask_T.to(like)


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss = scale, (loss.shape, loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype, device = ctx.loss
        return gradients[0], torch.full(shape, ctx.scale, dtype=dtype, device=device), None


def attach_loss(carrier: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """``carrier`` as it is; whoever goes back through it also goes back through ``scale * loss``.

    That adds a loss to a training step without knowing the step: one backward pass, so it works under DDP and FSDP2
    and with recomputed activations, where a second backward would not.
    """
    attached: Tensor = _Attached.apply(carrier, loss, scale)  # type: ignore[no-untyped-call]
    return attached
