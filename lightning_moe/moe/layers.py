"""Discovery: find the MoE layers of any model by their structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.non_uniform import Block, find_blocks, per_expert_tensors, stacked_parameters
from lightning_moe.moe.split_tensors import whole

KEPT = "lightning_moe_kept"
"""Where a router whose other experts are masked out keeps the ids of those that are left."""

UNPACK = "lightning_moe_unpack"
"""Where an experts module with packed stacks keeps what unpacks each, by name."""


@dataclass(frozen=True)
class LayerShape:
    """What planning needs to know of an MoE layer."""

    name: str
    """Path of the block in the model, as ``model.layers.3.mlp``."""
    index: int
    """Number of the decoder layer that holds the block."""
    num_experts: int
    top_k: int
    num_groups: int = 1
    """Groups of a group-limited router (DeepSeek); 1 where the router sees all experts at once."""
    topk_group: int = 1
    """Groups a token may use, of ``num_groups``."""

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def fewest_per_group(self) -> int:
        """Experts each group must keep so that the router can still pick ``top_k``.

        Group-limited routers rank groups by their two best experts, so two must stay in each.
        """
        return self.top_k if self.num_groups == 1 else max(2, -(-self.top_k // self.topk_group))

    @property
    def fewest(self) -> int:
        return self.fewest_per_group * self.num_groups


@dataclass(frozen=True)
class MoELayer:
    """A view of one MoE block inside a model: its router, its experts, its counts. It owns nothing."""

    parts: Block

    @property
    def name(self) -> str:
        return self.parts.name

    @property
    def router(self) -> nn.Module:
        return self.parts.routers[0]

    @property
    def experts(self) -> nn.Module:
        return self.parts.experts

    @property
    def num_experts(self) -> int:
        return stacked_parameters(self.experts)["down_proj"].shape[0]

    @property
    def top_k(self) -> int:
        return next(
            value
            for module in (self.router, self.parts.block)
            if isinstance(value := getattr(module, "top_k", None), int)
        )

    @property
    def kept(self) -> list[int] | None:
        """The experts that are left where others are masked out; None where none is."""
        kept: list[int] | None = vars(self.router).get(KEPT)
        return kept

    @property
    def shape(self) -> LayerShape:
        """With the number of experts that are left."""
        groups = getattr(self.router, "num_group", None) or 1
        if getattr(self.router, "topk_method", "") == "greedy":  # DeepSeek-V2 has groups in its config, unused
            groups = 1
        topk_group = (getattr(self.router, "topk_group", None) or 1) if groups > 1 else 1
        left = self.num_experts if self.kept is None else len(self.kept)
        return LayerShape(self.name, self.parts.index, left, self.top_k, groups, topk_group)

    @property
    def router_weight(self) -> Tensor:
        """The router's matrix, ``(E, H)``."""
        return next(p for p in self.router.parameters() if p.dim() == 2 and p.shape[0] == self.num_experts)

    @property
    def expert_matrices(self) -> list[Tensor]:
        """The experts' matrices, see ``matrices_of``.

        Of a model that is split over ranks every rank must ask, and gets them as a whole.
        """
        matrices: list[Tensor] = []
        unpack = vars(self.experts).get(UNPACK, {})
        for name, stored in stacked_parameters(self.experts).items():
            matrices += self.matrices_of(name, unpack[name]() if name in unpack else whole(stored))
        return matrices

    def matrices_of(self, name: str, stack: Tensor) -> list[Tensor]:
        """The matrices in the experts' parameter ``name``, or in a tensor of its form, as views ``(E, H, F)``.

        Whatever way a family stores them: model width first, a fused gate-and-up stack taken apart.
        """
        if bool(self.experts.is_transposed) == (name == "down_proj"):
            stack = stack.transpose(-2, -1)
        if not name.startswith("gate_up"):
            return [stack]
        half = stack.shape[-1] // 2
        concatenated = bool(self.experts.is_concatenated)
        return [stack[..., :half], stack[..., half:]] if concatenated else [stack[..., ::2], stack[..., 1::2]]

    @property
    def correction_biases(self) -> list[Tensor]:
        """The biases that only steer the choice of experts (DeepSeek-V3, Ernie), not their weight."""
        found = per_expert_tensors(self.parts)
        return [tensor for owner, name, tensor, _ in found if owner is not self.experts and "correction" in name]


def hugging_face_model(module: nn.Module, asker: str) -> PreTrainedModel:
    """The Hugging Face model inside anybody's module, the first MoE where there are several.

    ``asker`` opens the error when there is none.
    """
    models = hugging_face_models(module)
    if not models:
        raise TypeError(f"{asker}: {type(module).__name__} holds no Hugging Face model.")
    return next((model for model in models if any(find_blocks(model))), models[0])


def hugging_face_models(module: nn.Module) -> list[PreTrainedModel]:
    """All Hugging Face models inside anybody's module, without those that are parts of others."""
    if isinstance(module, PreTrainedModel):
        return [module]
    found = [model for child in module.children() for model in hugging_face_models(child)]
    return list(dict.fromkeys(found))


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find all MoE layers of ``model``, in the order of depth.

    Raises ``InputError`` when there are none, or when a router does not hand its choice to the experts (Llama 4).
    """
    layers = [_checked(block) for block in find_blocks(model)]
    if not layers:
        raise InputError(f"{type(model).__name__}: no MoE layers found; this is not a Mixture-of-Experts model.")
    return layers


def check_unpacked(model: nn.Module, what: str) -> None:
    """Raise ``InputError`` for experts that are packed (``quantise_experts``): they cannot be saved, nor cut."""
    if any(UNPACK in vars(block.experts) for block in find_blocks(model)):
        raise InputError(f"a model with packed experts (moe_fsdp: quantize) cannot be {what}; leave quantize out.")


def computing_device(model: nn.Module) -> torch.device:
    """Where the model computes: of its routers, which stay there when other weights are kept in the CPU's memory."""
    return find_moe_layers(model)[0].router_weight.device


def parameters_left(model: PreTrainedModel) -> int:
    """Parameters of the model without those of experts that are masked out."""
    gone = 0
    for layer in find_moe_layers(model):
        if layer.kept is not None:
            masked = layer.num_experts - len(layer.kept)
            stacks = [tensor for *_, tensor, _ in per_expert_tensors(layer.parts) if isinstance(tensor, nn.Parameter)]
            gone += sum(tensor.numel() for tensor in stacks) // layer.num_experts * masked
    return int(model.num_parameters()) - gone


def _checked(block: Block) -> MoELayer:
    if not hasattr(block.experts, "is_transposed"):  # set by transformers' decorator for experts functions
        raise InputError(
            f"{block.name}: {type(block.experts).__name__} runs every expert on scaled inputs instead of being handed "
            "the router's choice; this kind of MoE block (Llama 4) is not supported."
        )
    if len(block.routers) != 1:
        raise InputError(f"{block.name}: expected one router beside the experts, found {len(block.routers)}.")
    if not any(hasattr(module, "top_k") for module in (block.routers[0], block.block)):
        raise InputError(f"{block.name}: the router does not say how many experts it picks (no `top_k`).")
    return MoELayer(block)
