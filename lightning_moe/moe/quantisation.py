"""Experts of a frozen model in 4 or 8 bits, by bitsandbytes: unpacked one layer at a time, when they compute."""

# E experts

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import UNPACK, MoELayer
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.split_tensors import whole

Quantisation = Literal["nf4", "int8"]
"""4-bit normal floats in blocks of 64, or 8-bit codes in blocks of 256."""

BLOCKS = {"nf4": 64, "int8": 256}


def check_quantisation(kind: str | None) -> None:
    """Raise ``InputError`` for what cannot be done."""
    if kind is None:
        return
    if kind not in get_args(Quantisation):
        raise InputError(f"moe_fsdp: quantize {kind!r}: one of {', '.join(get_args(Quantisation))}, or null.")
    if find_spec("bitsandbytes") is None:
        raise InputError(f"moe_fsdp: quantize {kind}: bitsandbytes is not installed; pip install bitsandbytes.")


def quantise_experts(layer: MoELayer, kind: Quantisation) -> None:
    """Put packed bytes ``(E, 1, .)`` in place of each stack of the layer's experts; they can learn no more.

    The scales, a float32 for each block, stay beside them as they are. Only ``experts_forward`` computes with such
    experts. Where a stack's matrices are no whole number of blocks it raises ``InputError``.
    """
    import bitsandbytes.functional as bnb

    experts = layer.experts
    unpack: dict[str, Callable[[], Tensor]] = {}
    for name, stack in stacked_parameters(experts).items():
        size, block = stack[0].numel(), BLOCKS[kind]
        if size % block:
            raise InputError(
                f"moe_fsdp: quantize {kind}: {layer.name}: {name} has {size} weights per expert, no multiple of "
                f"{block}; leave quantize out."
            )
        packed, state = _packed(bnb, stack.detach(), kind, block)
        setattr(experts, name, nn.Parameter(packed.view(stack.shape[0], 1, -1), requires_grad=False))
        unpack[name] = _unpacker(bnb, experts, name, state, kind, stack.shape)
    vars(experts)[UNPACK] = unpack


def _packed(bnb: Any, stack: Tensor, kind: Quantisation, block: int) -> tuple[Tensor, Any]:
    """Packed bytes and scales of a stack, one expert after the other: on a CPU packing takes 14 bytes per weight."""
    packed, scales, state = [], [], None
    for expert in stack:
        if kind == "nf4":
            part, state = bnb.quantize_4bit(expert, blocksize=block, quant_type="nf4")
        else:
            part, state = bnb.quantize_blockwise(expert, blocksize=block)
        packed.append(part.flatten())
        scales.append(state.absmax)
    assert state is not None
    state.absmax, state.shape = torch.cat(scales), stack.shape
    return torch.cat(packed), state


def _unpacker(
    bnb: Any, experts: nn.Module, name: str, state: Any, kind: Quantisation, shape: torch.Size
) -> Callable[[], Tensor]:
    def unpack() -> Tensor:
        packed = whole(getattr(experts, name))
        state.to(packed.device)
        if kind == "nf4":
            weights: Tensor = bnb.dequantize_4bit(packed.reshape(-1, 1), state)
        else:
            weights = bnb.dequantize_blockwise(packed.view(shape), state)
        return weights.view(shape)

    return unpack
