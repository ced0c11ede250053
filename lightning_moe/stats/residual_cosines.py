"""Residual cosines: how alike the residual stream is before and after a layer (Expert Trimming, arXiv 2406.02500)."""

# T tokens, H model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.moe.decoder_layers import decoder_of
from lightning_moe.moe.hidden_states import given_back, taken
from lightning_moe.moe.layers import MoELayer

Record = Callable[[MoELayer, Tensor, Tensor], None]
"""``(layer, cosine of its MoE block, cosine of its decoder layer)``, two ``(T,)`` tensors."""


@contextmanager
def record_cosines(model: nn.Module, layers: Sequence[MoELayer], record: Record) -> Iterator[None]:
    """Call ``record`` with the cosines of every MoE layer that runs inside the context.

    That of the MoE block is ``cos(h, h + MoE(norm(h)))``, where ``h`` is the residual stream before the norm of the
    block, or before the block where it has none; that of the decoder layer is between its input and its output.
    """
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(_Watch(layer, decoder_of(model, layer.name), record).attached())
        yield


class _Watch:
    """Takes the residual stream at three places of one decoder layer."""

    def __init__(self, layer: MoELayer, decoder: nn.Module, record: Record) -> None:
        self.layer, self.decoder, self.record = layer, decoder, record
        self._entered = self._between = torch.empty(0)
        self._last: tuple[Tensor, Any] = self._entered, None

    @contextmanager
    def attached(self) -> Iterator[None]:
        block = self.layer.parts.block
        handles = [
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_pre_hook(self._reach_block, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave),
            *(child.register_forward_hook(self._pass_child, with_kwargs=True) for child in self.decoder.children()),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._entered = taken(args, kwargs)

    def _pass_child(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.layer.parts.block and (args or kwargs):
            self._last = taken(args, kwargs), output

    def _reach_block(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given, (before, made) = taken(args, kwargs), self._last
        self._between = before if given is made else given

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        left = given_back(output)
        with torch.no_grad(), torch.autocast(left.device.type, enabled=False):
            self.record(self.layer, _cosine(self._between, left), _cosine(self._entered, left))
        self._entered = self._between = torch.empty(0)
        self._last = self._entered, None


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of each token, ``(T,)``, in float32."""
    one_TH, other_TH = one.flatten(0, -2).float(), other.flatten(0, -2).float()
    lengths_T = torch.linalg.vector_norm(one_TH, dim=-1) * torch.linalg.vector_norm(other_TH, dim=-1)
    products_T = torch.linalg.vecdot(one_TH, other_TH)
    cosine_T: Tensor = products_T / lengths_T.clamp(min=torch.finfo(torch.float32).tiny)
    return cosine_T
