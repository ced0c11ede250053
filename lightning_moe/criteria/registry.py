"""The registry of criteria: one name, one pure function from a layer's statistics to scores."""

# E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_moe.errors import InputError, did_you_mean
from lightning_moe.stats.layer_stats import LayerStats

Direction = Literal["min", "max"]
"""Which end is dropped first: the experts with the least, or with the most, of what the criterion measures."""


@dataclass(frozen=True)
class Criterion:
    """A named criterion. ``scores`` is what callers want; higher means keep."""

    name: str
    direction: Direction
    """What the paper drops."""
    comparable: bool
    """Whether the scores of two layers may be compared; a drop order within the layer may not."""
    summary: str
    function: Callable[[LayerStats, Direction, int], Tensor]
    stable_ranks: bool = False
    """Whether it needs those, which are dear."""
    gradients: bool = False
    """Whether it needs those, which take a backward pass."""

    def scores(self, stats: LayerStats, direction: Direction | None = None, seed: int = 0) -> Tensor:
        """Score the experts of a layer: ``(E,)``, float64, higher means keep."""
        if self.gradients and not stats.has_gradients:
            raise InputError(
                f"{stats.shape.name}: criterion {self.name} needs gradients, and the statistics hold none; make them "
                "with `score --gradients true`."
            )
        scores_E = self.function(stats, direction or self.direction, seed).double().clone()
        if not bool(scores_E.isfinite().all()):
            raise InputError(f"{stats.shape.name}: criterion {self.name} is not finite; were the statistics damaged?")
        return scores_E


_CRITERIA: dict[str, Criterion] = {}


def _add(criterion: Criterion) -> None:
    if criterion.name in _CRITERIA:
        raise InputError(f"two criteria named {criterion.name!r}; give the second another name.")
    _CRITERIA[criterion.name] = criterion


def _summary(function: Callable[..., Tensor]) -> str:
    return (function.__doc__ or "").strip().partition("\n")[0]


def register(
    name: str, drops: Direction, stable_ranks: bool = False, gradients: bool = False
) -> Callable[[Callable[[LayerStats], Tensor]], Callable[[LayerStats], Tensor]]:
    """Register ``measure(stats) -> (E,)``; experts with the ``drops`` end of it are dropped first.

    ``stable_ranks`` and ``gradients`` say that it needs them: where only other criteria are asked for, none are made.
    """

    def decorate(measure: Callable[[LayerStats], Tensor]) -> Callable[[LayerStats], Tensor]:
        def scores(stats: LayerStats, direction: Direction, seed: int) -> Tensor:
            return measure(stats) if direction == "min" else -measure(stats)

        _add(Criterion(name, drops, True, _summary(measure), scores, stable_ranks, gradients))
        return measure

    return decorate


def register_pairs(
    name: str, drops: Direction
) -> Callable[[Callable[[LayerStats], Tensor]], Callable[[LayerStats], Tensor]]:
    """Register ``measure(stats) -> (E, E)``, symmetric, on pairs of experts.

    The pair at the ``drops`` end loses the less used of its two; then the next pair among those left, and so on.
    The order of dropping, over ``E``, is the score within the layer.
    """

    def decorate(measure: Callable[[LayerStats], Tensor]) -> Callable[[LayerStats], Tensor]:
        def scores(stats: LayerStats, direction: Direction, seed: int) -> Tensor:
            return drop_order(measure(stats), stats.count_E, direction) / stats.shape.num_experts

        _add(Criterion(name, drops, False, _summary(measure), scores))
        return measure

    return decorate


def drop_order(pairs_EE: Tensor, count_E: Tensor, direction: Direction) -> Tensor:
    """The turn at which each expert is dropped, ``(E,)``: 0 is first. Ties go to the pair with the lowest ids."""
    num_experts = count_E.shape[0]
    worst, sign = float("-inf"), 1.0 if direction == "max" else -1.0
    pairs_EE = (sign * pairs_EE.double()).masked_fill(
        torch.ones(num_experts, num_experts, dtype=torch.bool).tril(), worst
    )
    order_E = torch.full((num_experts,), num_experts - 1, dtype=torch.float64)
    for turn in range(num_experts - 1):
        first, second = divmod(int(pairs_EE.argmax()), num_experts)
        # The less used goes; of two used alike, the one with the higher id.
        dropped = first if count_E[first] < count_E[second] else second
        order_E[dropped] = turn
        pairs_EE[dropped, :] = worst
        pairs_EE[:, dropped] = worst
    return order_E


def register_random(name: str) -> None:
    def scores(stats: LayerStats, direction: Direction, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + stats.shape.index)
        return torch.rand(stats.shape.num_experts, generator=generator, dtype=torch.float64)

    _add(Criterion(name, "min", True, "Random scores from a seed: what any criterion must beat.", scores))


def get_criterion(name: str) -> Criterion:
    """Look up a criterion; an unknown name is refused with the nearest known one."""
    if name not in _CRITERIA:
        raise InputError(
            f"Unknown criterion '{name}'.{did_you_mean(name, _CRITERIA)} Known: {', '.join(sorted(_CRITERIA))}."
        )
    return _CRITERIA[name]


def criteria() -> list[Criterion]:
    """All registered criteria, in the order of registration."""
    return list(_CRITERIA.values())


register_random("random")
