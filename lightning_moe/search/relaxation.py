"""The relaxations: how alpha and beta enter the forward pass of a frozen MoE model."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.experts import ExpertHooks, Route, expert_hooks
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.search.importance import ImportanceLogits

Relaxation = Literal["routed", "dense-routed", "literal"]
"""With ``w`` the router's weights and ``a = softmax(alpha)``, each layer gives

- ``routed``: ``beta * sum over top-k of w_i (E a_i) f_i(x)``; the pretrained model at the start, at its price;
- ``dense-routed``: the same sum over all experts, ``w`` the softmax of all the router's logits;
- ``literal``: ``beta * sum over all experts of a_i f_i(x)`` (DiEP, Eq. 5 as printed): no router at all.
"""


@contextmanager
def relaxed(
    model: PreTrainedModel, layers: list[MoELayer], importance: ImportanceLogits, relaxation: Relaxation
) -> Iterator[None]:
    """Run ``model`` relaxed inside the context; gradients reach alpha and beta.

    With gradient checkpointing the backward pass must run inside the context too, since it runs layers again.
    """
    routings: dict[str, Routing] = {}
    hooks = {
        layer.name: ExpertHooks(gates_E=_of_all(layer, gates_E), route=_route(relaxation, layer, routings))
        for layer, gates_E in zip(layers, importance.gates(), strict=True)
    }
    with ExitStack() as contexts:
        if relaxation == "dense-routed":
            contexts.enter_context(
                record_routing(layers, lambda layer, routing: routings.update({layer.name: routing}))
            )
        contexts.enter_context(expert_hooks(model, layers, hooks))
        yield


def _route(relaxation: Relaxation, layer: MoELayer, routings: dict[str, Routing]) -> Route | None:
    """What weight each expert gets before its gate, and for ``routed`` nothing new."""
    if relaxation == "routed":
        return None

    def everywhere(expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        ids_E = _left(layer, expert_ids_TK.device)
        num_experts, tokens = ids_E.shape[0], expert_ids_TK.shape[0]
        expert_ids_TE = ids_E.expand(tokens, num_experts)
        if relaxation == "literal":
            return expert_ids_TE, torch.full(
                (tokens, num_experts), 1 / num_experts, dtype=torch.float32, device=weights_TK.device
            )
        return expert_ids_TE, routings[layer.name].logits_TE.float().softmax(-1).index_select(1, ids_E)

    return everywhere


def _left(layer: MoELayer, device: torch.device) -> Tensor:
    """The experts that are not masked out."""
    return torch.arange(layer.num_experts, device=device) if layer.kept is None else torch.tensor(layer.kept).to(device)


def _of_all(layer: MoELayer, gates_E: Tensor) -> Tensor:
    """Gates by the id of the expert, where the others are masked out; none of these is ever chosen."""
    if layer.kept is None:
        return gates_E
    return gates_E.new_ones(layer.num_experts).index_copy(0, _left(layer, gates_E.device), gates_E)
