"""RouterReplay: what a router would decide with fewer experts, from logits that it has made once."""

# T tokens, E experts, H model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.routing import AtLogits, mask_experts, read_routing, unwatched


@dataclass(frozen=True)
class RouterReplay:
    """The logits of one router for some tokens, and what it decides on them.

    All that comes after the linear map is the router's own code, run anew for every set of experts: softmax or sigmoid,
    correction bias, groups, top-k, normalisation, scaling. What costs ``H`` for each token is done once.
    """

    layer: MoELayer
    logits_TE: Tensor
    """As the linear map gave them, in their own type."""
    input_shape: tuple[int, ...]
    """Of what the router was given, a dimension of tokens and one of width at its end."""
    blank: Tensor
    """A single zero of the type of that input; what the input held is in the logits."""
    flat: bool
    """Whether the linear map saw a row for each token, whatever shape the router was given."""
    rest: tuple[tuple[Any, ...], dict[str, Any]]
    """What else the router was given, in order and by name."""

    def rows(self, rows: slice | Tensor, device: torch.device | str) -> RouterReplay:
        """The same for some of the tokens, on a device."""
        return replace(self, logits_TE=self.logits_TE[rows].to(device), blank=self.blank.to(device))

    def weights(self, keep: Sequence[int]) -> Tensor:
        """The routing weight of every expert, ``(T, E)`` float64, as if only those in ``keep`` existed."""
        num_tokens, num_experts = self.logits_TE.shape
        above, width = (1,) * (len(self.input_shape) - 2), self.input_shape[-1]
        logits = self.logits_TE if self.flat else self.logits_TE.view(*above, num_tokens, num_experts)
        hidden = self.blank.expand(*above, num_tokens, width)  # takes no memory
        args, kwargs = self.rest
        with unwatched(), mask_experts(self.layer, keep), AtLogits(num_experts, lambda make: logits):
            routing = read_routing(self.layer.router(hidden, *args, **kwargs), num_experts)
        weights_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float64, device=self.logits_TE.device)
        return weights_TE.scatter_add_(1, routing.expert_ids_TK, routing.weights_TK.double())


@contextmanager
def record_replays(layer: MoELayer, record: Callable[[RouterReplay], None]) -> Iterator[None]:
    """Inside the context every forward of the layer's router hands its ``RouterReplay`` to ``record``."""
    router, num_experts = layer.router, layer.num_experts
    outer, forward = vars(router).get("forward"), router.forward

    def recorded(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen: list[Tensor] = []

        def see(make: Callable[[], Tensor]) -> Tensor:
            seen.append(make())
            return seen[-1]

        with AtLogits(num_experts, see):
            output = forward(hidden, *args, **kwargs)
        if not seen:
            raise InputError(
                f"{layer.name}: this router makes its logits by no linear map, so they cannot be replayed."
            )
        logits_TE, flat = seen[-1].reshape(-1, num_experts), seen[-1].dim() == 2
        record(RouterReplay(layer, logits_TE, tuple(hidden.shape), hidden.new_zeros(1), flat, (args, kwargs)))
        return output

    router.forward = recorded
    try:
        yield
    finally:
        if outer is None:
            del router.forward  # the instance attribute; the class's own forward is back
        else:
            router.forward = outer
