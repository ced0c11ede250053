"""Layers left out: a model runs as if some MoE blocks or decoder layers were not there; no weight changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_moe.moe.decoder_layers import decoder_of
from lightning_moe.moe.hidden_states import put_back, taken
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.non_uniform import no_experts_for


@contextmanager
def layers_left_out(
    model: nn.Module, layers: Sequence[MoELayer], keep: Mapping[str, Sequence[int]], blocks: Collection[str]
) -> Iterator[None]:
    """Inside the context MoE blocks of which ``keep`` names no expert add nothing, and those in ``blocks`` neither.

    A decoder layer of the latter hands on what it is given. It is the logical form of what ``keep_experts`` does, for
    a model that is split over ranks; discovery finds only the blocks that are left.
    """
    with ExitStack() as undo:
        for layer in layers:
            if layer.name in blocks or len(keep.get(layer.name, (0,))) == 0:
                undo.enter_context(_block_left_out(model, layer))
            if layer.name in blocks:
                handle = decoder_of(model, layer.name).register_forward_hook(_hand_on, with_kwargs=True)
                undo.callback(handle.remove)
        yield


@contextmanager
def _block_left_out(model: nn.Module, layer: MoELayer) -> Iterator[None]:
    path, _, own = layer.name.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, own, no_experts_for(layer.parts.block))
    try:
        yield
    finally:
        setattr(parent, own, layer.parts.block)


def _hand_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return put_back(output, taken(args, kwargs))
