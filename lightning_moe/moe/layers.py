"""Discovery: find the MoE layers of any model by their structure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_moe.errors import InputError

COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names under which configs and modules hold their number of experts."""

TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk")
"""The names under which configs and modules hold the number of experts per token."""


@dataclass(frozen=True)
class MoELayer:
    """A view of one MoE block inside a model: its router, its experts, its counts. It owns nothing."""

    name: str
    """Path of the block in the model, as ``model.layers.3.mlp``."""
    index: int
    """Number of the decoder layer that holds the block."""
    block: nn.Module
    router: nn.Module
    experts: nn.Module

    @property
    def num_experts(self) -> int:
        return next(stacked_parameters(self.experts))[1].shape[0]

    @property
    def top_k(self) -> int:
        for module in (self.router, self.block):
            value = getattr(module, "top_k", None)
            if isinstance(value, int):
                return value
        raise InputError(f"{self.name}: its router does not say how many experts it picks (no `top_k`).")

    @property
    def num_groups(self) -> int:
        """Groups of a group-limited router (DeepSeek); 1 where the router sees all experts at once."""
        if getattr(self.router, "topk_method", "") == "greedy":
            return 1
        return getattr(self.router, "num_group", None) or 1

    @property
    def topk_group(self) -> int:
        """Groups a token may use, of ``num_groups``."""
        return (getattr(self.router, "topk_group", None) or 1) if self.num_groups > 1 else 1

    @property
    def router_weight(self) -> Tensor:
        """The router's matrix, ``(E, H)``."""
        for parameter in self.router.parameters():
            if parameter.dim() == 2 and parameter.shape[0] == self.num_experts:
                return parameter
        raise AssertionError(f"{self.name}: discovery accepted a router without a matrix")

    def expert_matrices(self) -> list[Tensor]:
        """The experts' matrices as stacks ``(E, ., .)``, a fused gate-and-up stack taken apart."""
        matrices = []
        for name, stack in stacked_parameters(self.experts):
            if name.startswith("gate_up"):
                stack = stack if self.experts.is_transposed else stack.transpose(-2, -1)
                half = stack.shape[-1] // 2
                split = (stack[..., :half], stack[..., half:])
                matrices += split if self.experts.is_concatenated else [stack[..., ::2], stack[..., 1::2]]
            else:
                matrices.append(stack)
        return matrices

    def per_expert_tensors(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        """Every parameter and buffer with one slice per expert: ``(owner, name, tensor, expert dimension)``.

        That is all of the experts module, the router with what it nests, and what the block itself holds
        (MiniMax-M2 keeps its correction bias there).
        """
        owners = [self.experts, *self.router.modules(), self.block]
        for owner in owners:
            for name, tensor in [
                *owner.named_parameters(recurse=False),
                *owner.named_buffers(recurse=False),
            ]:
                dimension = next((d for d, size in enumerate(tensor.shape) if size == self.num_experts), None)
                if dimension is not None:
                    yield owner, name, tensor, dimension


def stacked_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters a module itself holds as ``(E, ., .)`` stacks."""
    return (
        (name, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    )


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find all MoE layers of ``model``, in the order of depth.

    An experts module holds at least two stacks ``(E, ., .)`` with the same ``E`` and one of them is named
    ``down_proj``; its router is the sibling whose subtree holds a matrix ``(E, .)``. Raises ``InputError`` when
    there are none, or when one has a router that does not hand its choice to the experts (Llama 4).
    """
    layers: list[MoELayer] = []
    for path, experts in model.named_modules():
        stacks = dict(stacked_parameters(experts))
        if "down_proj" not in stacks or len({stack.shape[0] for stack in stacks.values()}) != 1 or len(stacks) < 2:
            continue
        name, _, own = path.rpartition(".")
        layers.append(_moe_layer(model, name, own, experts, len(layers)))
    if not layers:
        raise InputError(f"{type(model).__name__}: no MoE layers found; this is not a Mixture-of-Experts model.")
    return layers


def _moe_layer(model: nn.Module, name: str, own: str, experts: nn.Module, ordinal: int) -> MoELayer:
    block = model.get_submodule(name)
    if not hasattr(experts, "is_transposed"):
        raise InputError(
            f"{name}: {type(experts).__name__} computes every expert on scaled inputs instead of being handed the "
            "router's choice; this kind of MoE block (Llama 4) is not supported."
        )
    num_experts = next(stacked_parameters(experts))[1].shape[0]
    routers = [
        child
        for child_name, child in block.named_children()
        if child_name != own
        and "shared" not in child_name
        and any(p.dim() == 2 and p.shape[0] == num_experts for p in child.parameters())
    ]
    if len(routers) != 1:
        raise InputError(f"{name}: expected one router beside {num_experts} experts, found {len(routers)}.")
    return MoELayer(name, layer_index(name, ordinal), block, routers[0], experts)


def layer_index(name: str, default: int = -1) -> int:
    """The decoder layer's number in a dotted path: the first number in it."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number.group(1)) if number else default
