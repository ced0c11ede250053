"""Block cuts: where the MoE block of each decoder layer lies on disk, and what happens to its tensors."""

# E experts

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_moe.errors import InputError
from lightning_moe.moe.decoder_layers import renumbered
from lightning_moe.moe.merged_experts import Groups
from lightning_moe.moe.neuron_order import NeuronAxis
from lightning_moe.moe.tensor_reader import opened
from lightning_moe.moe.weight_shards import LAYER, NUMBER

EXPERT = re.compile(r"\.experts\.(\d+)\.")
FIRST = ".experts.0."


@dataclass(frozen=True)
class BlockCut:
    """What happens to the tensors of one decoder layer's MoE block on disk."""

    component: str
    """Name of the block on disk (``mlp``, ``block_sparse_moe``, ``feed_forward``), which may differ from memory."""
    path: str
    """What stands before the number of the decoder layer in the names of its tensors."""
    num_experts: int
    keep: Sequence[int]
    """Empty where the whole block goes, router and shared experts with it."""
    groups: Groups = field(default_factory=dict)
    """Kept experts that others are averaged into."""
    router: bool = False
    """Whether the router's rows are averaged along."""
    axes: Mapping[str, NeuronAxis] = field(default_factory=dict)
    """Where the neurons of an expert lie, by name of the tensor (of expert 0); empty when they are not aligned."""


def find_cuts(files: Sequence[Path], by_index: Mapping[int, tuple[int, Sequence[int]]]) -> dict[int, BlockCut]:
    """Find each MoE block on disk: where the per-expert tensors, or the stacks ``(E, ., .)``, of a layer lie."""
    cuts: dict[int, BlockCut] = {}
    experts_seen: dict[int, set[int]] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                layer = LAYER.search(name)
                if layer is None or int(layer.group(1)) not in by_index or "shared" in name:
                    continue
                index, component = int(layer.group(1)), layer.group(2)
                num_experts, keep = by_index[index]
                expert = EXPERT.search(name)
                if expert is not None:
                    experts_seen.setdefault(index, set()).add(int(expert.group(1)))
                shape = tensors.get_slice(name).get_shape()
                if expert is not None or (len(shape) >= 3 and shape[0] == num_experts):
                    cuts[index] = BlockCut(component, name[: layer.start(1)], num_experts, keep)
    for index, (num_experts, _) in by_index.items():
        seen = experts_seen.get(index, set(range(num_experts)))
        if index not in cuts or seen != set(range(num_experts)):
            raise InputError(
                f"{files[0].parent}: decoder layer {index} should hold {num_experts} experts, but its weight files "
                f"hold {len(seen) if index in cuts else 0}; the checkpoint is incomplete."
            )
    return cuts


def cut_of(name: str, cuts: Mapping[int, BlockCut]) -> BlockCut | None:
    """The cut of the MoE block that a tensor belongs to, if any."""
    layer = LAYER.search(name)
    cut = cuts.get(int(layer.group(1))) if layer else None
    return None if layer is None or cut is None or layer.group(2) != cut.component or "shared" in name else cut


def name_after(name: str, cuts: Mapping[int, BlockCut], dropped: Collection[int]) -> str | None:
    """The name of a tensor when the decoder layers ``dropped`` are gone, experts aside; None where it goes along.

    It also goes with a block that keeps no expert. Layers behind the last (those that predict further tokens, which
    transformers leaves aside) move up.
    """
    number = NUMBER.search(name)
    if number is None:
        return name
    index, component = int(number[1]), LAYER.search(name)
    cut = cuts.get(index)
    if name[: number.start(1)] not in {one.path for one in cuts.values()}:
        return name  # of another tower
    if cut is not None and not len(cut.keep) and component is not None and component[2] == cut.component:
        return None
    if index in dropped:
        return None
    return f"{name[: number.start(1)]}{renumbered(index, dropped)}{name[number.end(1) :]}"
