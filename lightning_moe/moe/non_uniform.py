"""MoE models whose layers hold different numbers of experts.

This file needs nothing but torch and transformers: a copy of it travels with every non-uniform checkpoint, so that
``trust_remote_code=True`` loads one where lightning_moe is not installed. The counts stand in the config as
transformers' own ``per_layer_config``; the stock model builds all layers alike, and ``resize_moe_layers`` then cuts
each one to its count, before any weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The names under which configs and modules hold their number of experts."""


@dataclass(frozen=True)
class Block:
    """An MoE block and its parts."""

    name: str
    index: int
    """Number of the decoder layer."""
    block: nn.Module
    experts: nn.Module
    routers: list[nn.Module]
    """Siblings of the experts that hold a matrix with a row per expert: one, in what we support."""


def stacked_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters a module itself holds as ``(E, ., .)`` stacks."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def find_blocks(model: nn.Module) -> Iterator[Block]:
    """Find MoE blocks by structure.

    An experts module holds at least two stacks of the same ``E``, one of them named ``down_proj``; its router is
    the sibling with a matrix ``(E, .)``, itself or nested, shared experts left aside.
    """
    for path, experts in model.named_modules():
        stacks = stacked_parameters(experts)
        if "down_proj" not in stacks or len(stacks) < 2 or len({s.shape[0] for s in stacks.values()}) != 1:
            continue
        name, _, own = path.rpartition(".")
        block = model.get_submodule(name)
        num_experts = stacks["down_proj"].shape[0]
        routers = [
            child
            for child_name, child in block.named_children()
            if child_name != own
            and "shared" not in child_name
            and any(p.dim() == 2 and p.shape[0] == num_experts for p in child.parameters())
        ]
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        yield Block(name, int(number.group(1)) if number else 0, block, experts, routers)


def per_expert_tensors(block: Block) -> list[tuple[nn.Module, str, Tensor, int]]:
    """Every parameter and buffer with one slice per expert: ``(owner, name, tensor, expert dimension)``.

    That is all of the experts module, the router with what it nests, and what the block itself holds (MiniMax-M2
    keeps its correction bias there).
    """
    num_experts = stacked_parameters(block.experts)["down_proj"].shape[0]
    owners = [block.experts, *(part for router in block.routers for part in router.modules()), block.block]
    found = []
    for owner in owners:
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            dimension = next((d for d, size in enumerate(tensor.shape) if size == num_experts), None)
            if dimension is not None:
                found.append((owner, name, tensor, dimension))
    return found


def keep_in_block(block: Block, keep: Sequence[int]) -> None:
    """Cut a block to the experts in ``keep``: stacks, router rows, biases, counts."""
    num_experts = stacked_parameters(block.experts)["down_proj"].shape[0]
    tensors = per_expert_tensors(block)
    for owner, name, tensor, dimension in tensors:
        ids = torch.tensor(keep, dtype=torch.long, device=tensor.device)
        kept = tensor.detach().index_select(dimension, ids)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, name, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, name, kept)
    for owner in {id(owner): owner for owner, *_ in tensors}.values():
        for name in (*COUNT_NAMES, "out_features"):
            if getattr(owner, name, None) == num_experts:
                setattr(owner, name, len(keep))
    for owner in (block.block, *block.routers):
        for name in COUNT_NAMES:
            if getattr(owner, name, None) == num_experts:
                setattr(owner, name, len(keep))


def experts_per_layer(config: Any) -> dict[int, int]:
    """Decoder layer -> number of experts, for the layers that a config's ``per_layer_config`` sets apart."""
    text_config = config.get_text_config()
    if not getattr(text_config, "is_heterogeneous", False):
        return {}
    counts = {}
    for index, layer_config in enumerate(text_config.per_layer_config):
        for name in COUNT_NAMES:
            count = getattr(layer_config, name, None)
            if isinstance(count, int):
                counts[index] = count
                break
    return counts


def resize_moe_layers(model: nn.Module) -> None:
    """Cut each MoE layer of a just built model to the count its config names; nothing to do is fine."""
    counts = experts_per_layer(model.config)
    if not counts:
        return
    for block in list(find_blocks(model)):
        have = stacked_parameters(block.experts)["down_proj"].shape[0]
        count = counts.get(block.index, have)
        if count < have:
            keep_in_block(block, range(count))
