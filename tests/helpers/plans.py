"""Plans for the tiny families: which experts stay, in every shape a plan can have."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.merged_experts import Merge, Router
from lightning_moe.pruning.merging import merge_groups

Keep = dict[str, list[int]]


def uniform_plan(model: PreTrainedModel) -> Keep:
    """Half of 8 experts in every layer; two in each half, so that two groups agree."""
    return {layer.name: [0, 2, 5, 7] for layer in find_moe_layers(model)}


def non_uniform_plan(model: PreTrainedModel) -> Keep:
    """4, 6, 4, 6 ... experts of 8, other ones in each layer."""
    plans = ([0, 2, 5, 7], [1, 2, 3, 4, 5, 6])
    return {layer.name: list(plans[turn % 2]) for turn, layer in enumerate(find_moe_layers(model))}


def fewest_plan(model: PreTrainedModel) -> Keep:
    """As few as the router can do with: in our families two, or two in each of two groups."""
    return {layer.name: [1, 6] if layer.shape.num_groups == 1 else [1, 2, 6, 7] for layer in find_moe_layers(model)}


def compose(first: Keep, second: Keep) -> Keep:
    """The one plan that does what ``first`` and then ``second`` (whose ids are those of the pruned model) do."""
    return {name: [ids[i] for i in second[name]] if name in second else ids for name, ids in first.items()}


def some_merge(keep: Keep, num_experts: int = 8, align: bool = False, router: Router = "kept") -> Merge:
    """Every dropped expert merged into some kept one, with weights that differ."""
    generator = torch.Generator().manual_seed(5)
    alike = {name: 3 * torch.rand(num_experts, num_experts, generator=generator) for name in keep}
    return Merge(merge_groups(keep, alike), align, router)
