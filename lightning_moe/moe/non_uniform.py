"""MoE models whose layers hold different numbers of experts.

This file needs nothing but torch and transformers: a copy of it travels with every non-uniform checkpoint, so that
``trust_remote_code=True`` loads one where lightning_moe is not installed. The counts stand in the config as
transformers' own ``per_layer_config``; the stock model builds all layers alike, and ``resize_moe_layers`` then cuts
each one to its count, before any weight is loaded. A count of 0 says that the whole block is gone; the count for all
layers is then one more than any has, or stock transformers would load the others and make up the block.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
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


class NoExperts(nn.Module):
    """Stands in the place of an MoE block that was dropped: it adds nothing, and the residual stream passes by.

    ``outputs`` is the length of the tuple that the block returned, None where it returned a tensor. What a block gives
    beside its output, as a router's scores, is None here.
    """

    def __init__(self, outputs: int | None = None) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden)
        return zeros if self.outputs is None else (zeros, *(None for _ in range(self.outputs - 1)))


def no_experts_for(block: nn.Module) -> NoExperts:
    """What can stand in the place of ``block``. Whether that returns a tuple is read from its own code."""
    code = textwrap.dedent(inspect.getsource(inspect.unwrap(type(block).forward)))
    returned = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Return)]
    return NoExperts(next((len(value.elts) for value in returned if isinstance(value, ast.Tuple)), None))


def drop_block(model: nn.Module, block: Block) -> None:
    """Put ``NoExperts`` in the place of a block: its experts, its router and what they share are gone."""
    parent, _, own = block.name.rpartition(".")
    setattr(model.get_submodule(parent), own, no_experts_for(block.block))


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
        if count == 0:
            drop_block(model, block)
        elif count < have:
            keep_in_block(block, range(count))
    set_common_count(model)


def set_common_count(model: nn.Module) -> None:
    """Tell the model itself how many experts its layers hold, where all agree: its own balance loss asks for it."""
    counts = {stacked_parameters(block.experts)["down_proj"].shape[0] for block in find_blocks(model)}
    for name in COUNT_NAMES:
        if len(counts) == 1 and isinstance(getattr(model, name, None), int):
            setattr(model, name, min(counts))
