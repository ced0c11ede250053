"""ImportanceLogits: what the search learns, alpha for each expert and beta for each layer."""

# L layers, E experts of one layer

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.errors import InputError


class ImportanceLogits(nn.Module):
    """Intra-layer logits alpha and inter-layer logits beta (DiEP, Eq. 4), float32 whatever the model's type.

    ``alpha = 0`` and ``beta = 1`` are the pretrained model: all gates are 1. Layers may differ in ``E``.
    """

    def __init__(self, experts_L: Sequence[int]) -> None:
        super().__init__()
        self.alphas = nn.ParameterList([nn.Parameter(torch.zeros(count, dtype=torch.float32)) for count in experts_L])
        self.beta_L = nn.Parameter(torch.ones(len(experts_L), dtype=torch.float32))

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, but not to its type: bfloat16 would swallow small updates."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def gates(self) -> list[Tensor]:
        """``E * softmax(alpha) * beta`` of each layer, ``(E,)``: 1 for every expert at the start."""
        return [layer_gates(alpha_E, beta) for alpha_E, beta in zip(self.alphas, self.beta_L.unbind(), strict=True)]


def layer_gates(alpha_E: Tensor, beta: Tensor) -> Tensor:
    """``E * softmax(alpha) * beta``, ``(E,)``, exactly ``beta`` where all alphas are equal."""
    # As powers over their mean: E * softmax(0) is not quite 1 in float32 for 41, 47, 55 and more counts.
    power_E = (alpha_E - alpha_E.detach().max()).exp()
    return power_E / power_E.mean() * beta


def beta_profile(profile: str, num_layers: int, seed: int) -> Tensor:
    """Fixed betas ``(L,)`` of mean 1: ``"a:b"`` gives the first half of the layers a/b times those of the second.

    ``"random"`` draws them from a seed, uniform. With an odd ``L`` the middle layer belongs to the second half.
    These are the rows of DiEP's ablation in which beta is not learned.
    """
    if profile == "random":
        beta_L = torch.rand(num_layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    else:
        first, second = parse_ratio(profile, "beta profile")
        half = num_layers // 2
        beta_L = torch.tensor([float(first)] * half + [float(second)] * (num_layers - half), dtype=torch.float32)
    return beta_L / beta_L.mean()


def parse_ratio(text: str, what: str) -> tuple[int, int]:
    """Read ``"a:b"``, two counts of at least 1."""
    first, _, second = text.partition(":")
    if not (first.isdecimal() and second.isdecimal() and int(first) > 0 and int(second) > 0):
        raise InputError(f"{what} {text!r}: expected two whole numbers from 1 up, such as 3:1.")
    return int(first), int(second)
