"""Semi-structured weights: two of every four are zero, along the inputs of every matrix of the routed experts.

Everything else keeps its weights: attention, routers, biases, shared experts, dense layers.
"""

# E experts, O outputs and I inputs of a matrix, G groups of four consecutive inputs of one output

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer, check_unpacked, find_moe_layers
from lightning_moe.moe.merged_experts import AVERAGED_TYPES
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.split_tensors import put, whole

PATTERN, PATTERN_RATIO = "2:4", 0.5
"""Its name, and the share of the experts' weights that go."""

GROUP = 4
"""Consecutive weights of one output of a matrix, of which half stay."""

PAIRS = torch.tensor([[place in pair for place in range(GROUP)] for pair in combinations(range(GROUP), 2)])
"""The six ways to keep two of four."""

Rule = Literal["random", "magnitude", "wanda"]
"""Which weights of a group go: any; the smallest ``|W|``; the smallest ``|W| ||x||_2`` (Wanda, arXiv 2306.11695)."""

InputNorms = Mapping[str, Mapping[str, Tensor]]
"""By layer and stack: ``||x||_2`` of every input of each expert's matrices over the tokens routed to it, ``(E, I)``.

Gate and up, which are one stack, take the same inputs.
"""


@dataclass(frozen=True)
class Matrix:
    """One matrix of one expert, by a name that it has in memory and on disk alike."""

    layer: str
    stack: str
    piece: int
    """Which of the matrices that are fused in the stack: of ``gate_up_proj`` 0 is gate and 1 is up."""
    expert: int


@dataclass(frozen=True)
class Pattern:
    """Which two of every four weights stay."""

    rule: Rule
    seed: int = 0
    """Of ``random``. Every matrix draws by its own name, so no order, and no number of processes, changes anything."""
    norms: InputNorms = field(default_factory=dict)
    """Of ``wanda``."""

    def kept(self, matrix: Matrix, weight_OI: Tensor) -> Tensor:
        """Where the weights stay, ``(O, I)``, bool; exactly two of every four.

        Ties fall to the first. An expert that no token was routed to has no inputs: Wanda takes it by magnitude.
        """
        outputs, inputs = weight_OI.shape
        if self.rule == "random":
            name = f"{self.seed} {matrix.layer} {matrix.stack} {matrix.piece} {matrix.expert}"
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
            generator = torch.Generator().manual_seed(number)
            pair_G = torch.randint(len(PAIRS), (outputs * inputs // GROUP,), generator=generator)
            return PAIRS[pair_G].view(outputs, inputs).to(weight_OI.device)
        importance_OI = weight_OI.detach().abs()
        importance_OI = importance_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        if self.rule == "wanda":
            norm_I = self.norms[matrix.layer][matrix.stack][matrix.expert].to(weight_OI.device)
            if bool(norm_I.any()):
                importance_OI = importance_OI * norm_I.to(importance_OI.dtype)
        return largest_two(importance_OI)

    def experts_without_inputs(self) -> int:
        """How many experts Wanda takes by magnitude."""
        return sum(
            int((~torch.stack([norm_EI.any(1) for norm_EI in stacks.values()]).any(0)).sum())
            for stacks in self.norms.values()
        )


def largest_two(importance_OI: Tensor) -> Tensor:
    """Where the two largest of every four consecutive inputs are, ``(O, I)``, bool; of equal ones the first.

    Six comparisons of whole tensors: sorting groups of four takes three times as long.
    """
    members = importance_OI.unflatten(-1, (-1, GROUP)).unbind(-1)
    wins = [torch.zeros(members[0].shape, dtype=torch.int8, device=importance_OI.device) for _ in members]
    for one, other in combinations(range(GROUP), 2):
        first_wins = members[one] >= members[other]
        wins[one] += first_wins
        wins[other] += ~first_wins
    return torch.stack([count >= GROUP // 2 for count in wins], -1).flatten(-2)


def zero_in_matrix(weight_OI: Tensor, matrix: Matrix, pattern: Pattern) -> int:
    """Set the weights that go to zero, in place; returns how many of the matrix are zero now."""
    weight_OI.masked_fill_(~pattern.kept(matrix, weight_OI), 0.0)
    return weight_OI.numel() - int(weight_OI.count_nonzero())


def zero_in_stack(stack: Tensor, layer: MoELayer, name: str, pattern: Pattern) -> int:
    """The same in all matrices of the experts' parameter ``name``, or of a tensor of its form."""
    zeros = 0
    for piece, matrices_EHF in enumerate(layer.matrices_of(name, stack)):
        # The model's width comes first there: down gives it, the others take it.
        matrices_EOI = matrices_EHF if name == "down_proj" else matrices_EHF.transpose(-2, -1)
        for expert, weight_OI in enumerate(matrices_EOI):
            zeros += zero_in_matrix(weight_OI, Matrix(layer.name, name, piece, expert), pattern)
    return zeros


@torch.no_grad()
def zero_in_model(model: PreTrainedModel, pattern: Pattern) -> int:
    """Set the weights that go to zero in a model in memory; returns how many of its experts' weights are zero now.

    Of a model that is split over ranks every rank must ask; one stack of one layer is gathered at a time. Raises
    ``InputError``, before anything is changed, where ``check_widths`` does, and for packed or quantised experts.
    """
    layers = find_moe_layers(model)
    check_unpacked(model, "pruned weight by weight")
    check_widths(layers)
    for layer in layers:
        for name, stack in stacked_parameters(layer.experts).items():
            check_type(f"{layer.name}: {name}", AVERAGED_TYPES.get(stack.dtype, str(stack.dtype)))
    zeros = 0
    for layer in layers:
        for name, stack in stacked_parameters(layer.experts).items():
            gathered = whole(stack)
            zeros += zero_in_stack(gathered, layer, name, pattern)
            if gathered is not stack:
                put(gathered, stack)
    return zeros


def input_width(layer: MoELayer, stack: Tensor) -> int:
    """What the matrices of an experts' stack take: the model's width, or, of down, that of the expert."""
    return stack.shape[-2 if layer.experts.is_transposed else -1]


def check_widths(layers: Sequence[MoELayer]) -> None:
    """Raise ``InputError`` where inputs do not come in fours."""
    for layer in layers:
        for name, stack in stacked_parameters(layer.experts).items():
            width = input_width(layer, stack)
            if width % GROUP:
                raise InputError(
                    f"{layer.name}: the matrices of {name} take {width} inputs, no multiple of {GROUP}, so two of "
                    f"every {GROUP} cannot go; drop whole experts instead."
                )


def check_type(name: str, spelled: str) -> None:
    """Refuse, in one line, experts whose numbers are codes; the type is given as safetensors spells it."""
    if spelled not in AVERAGED_TYPES.values():
        raise InputError(
            f"{name} is stored as {spelled.removeprefix('torch.')}: single weights of quantised experts cannot be set "
            "to zero; prune the model it was quantised from."
        )
