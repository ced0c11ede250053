"""Watching routers, and masking experts out of them."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import KEPT, MoELayer


@dataclass(frozen=True)
class Routing:
    """What one router decided in one forward."""

    logits_TE: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor


def read_routing(output: Any, num_experts: int) -> Routing:
    """Sort a router's output, a tuple of logits, weights and ids in any order, by shape and type."""
    ids = next(tensor for tensor in output if not torch.is_floating_point(tensor))
    logits, weights = _logits_and_weights(output, num_experts)
    rows = ids.shape[-1]
    return Routing(logits.reshape(-1, num_experts), weights.reshape(-1, rows), ids.reshape(-1, rows))


def _logits_and_weights(output: Any, num_experts: int) -> tuple[Tensor, Tensor]:
    floats = [tensor for tensor in output if torch.is_floating_point(tensor)]
    logits = next(tensor for tensor in floats if tensor.shape[-1] == num_experts)
    return logits, next(tensor for tensor in floats if tensor is not logits)


_depth = 0
"""Of ``unwatched`` contexts that are open."""


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside the context, whoever began to watch routers outside of it sees nothing and changes nothing."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


@contextmanager
def record_routing(layers: Iterable[MoELayer], record: Callable[[MoELayer, Routing], None]) -> Iterator[None]:
    """Call ``record`` with every routing decision made inside the context; what it returns changes nothing."""

    def watch(layer: MoELayer, routing: Routing) -> None:
        record(layer, routing)

    with rewrite_weights(layers, watch):
        yield


@contextmanager
def rewrite_weights(
    layers: Iterable[MoELayer], rewrite: Callable[[MoELayer, Routing], Tensor | None]
) -> Iterator[None]:
    """Let ``rewrite`` see every routing decision made inside the context and give other weights, or None for as is."""
    depth = _depth

    def hook_of(layer: MoELayer) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if depth != _depth:
                return None
            routing = read_routing(output, layer.num_experts)
            weights_TK = rewrite(layer, routing)
            if weights_TK is None:
                return None
            # The tuple's own tensor may have another shape than the view of it in ``routing``.
            _, own = _logits_and_weights(output, layer.num_experts)
            return type(output)(weights_TK.view_as(part) if part is own else part for part in output)

        return hook

    handles = [layer.router.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class AtLogits(TorchFunctionMode):
    """Lets ``instead`` give the logits where a router's linear map makes them; its argument makes the router's own.

    Every family computes its logits by ``linear`` inside the router's forward and goes on from there in its own
    way (softmax, sigmoid, groups, bias); only at that place is one change right for all of them.
    """

    def __init__(self, num_experts: int, instead: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        super().__init__()
        self.num_experts, self.instead = num_experts, instead
        self.hits = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.linear:
            return func(*args, **kwargs)
        weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
        if weight.shape[0] != self.num_experts:
            return func(*args, **kwargs)
        self.hits += 1
        return self.instead(lambda: func(*args, **kwargs))


@contextmanager
def mask_plan(layers: Iterable[MoELayer], keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Route every layer named in ``keep`` as if only those of its experts existed: the logical form of a plan."""
    with ExitStack() as masks:
        for layer in layers:
            if layer.name in keep:
                masks.enter_context(mask_experts(layer, keep[layer.name]))
        yield


@contextmanager
def mask_experts(layer: MoELayer, keep: Sequence[int]) -> Iterator[None]:
    """Route as if only the experts in ``keep`` existed; no weight changes.

    The router's logits of all others are -inf; where selection adds a correction bias after a sigmoid or softmax,
    that bias is -inf too, since such a score of 0 could still win.
    """
    dropped_E = torch.ones(layer.num_experts, dtype=torch.bool)
    dropped_E[list(keep)] = False
    biases = layer.correction_biases
    saved = [bias.detach().clone() for bias in biases]
    forward = layer.router.forward

    def masked(make: Callable[[], Tensor]) -> Tensor:
        logits = make()
        return logits.masked_fill(dropped_E.to(logits.device), float("-inf"))

    def masked_forward(*args: Any, **kwargs: Any) -> Any:
        with AtLogits(layer.num_experts, masked) as mask:
            output = forward(*args, **kwargs)
        if mask.hits != 1:
            raise InputError(
                f"{layer.name}: this router makes its logits by {mask.hits} linear maps in place of one, so its "
                "experts cannot be masked; prune the model instead."
            )
        return output

    with torch.no_grad():
        for bias in biases:
            bias[..., dropped_E.to(bias.device)] = float("-inf")
    layer.router.forward = masked_forward
    vars(layer.router)[KEPT] = list(keep)
    try:
        yield
    finally:
        del layer.router.forward  # the instance attribute; the class's own forward is back
        del vars(layer.router)[KEPT]
        with torch.no_grad():
            for bias, value in zip(biases, saved, strict=True):  # the others may have moved
                bias[..., dropped_E.to(bias.device)] = value[..., dropped_E.to(bias.device)]
