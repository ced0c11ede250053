"""NAEE's search: the set of experts whose absence changes a layer's output least (arXiv 2402.14800)."""

# S sets of experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from math import comb

from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape

EXACT_SETS = 20_000
"""Most sets of one layer that are all tried: C(16, 8) is 12,870, C(18, 9) is 48,620."""

BEAM = 8
"""Sets that are carried from one removal to the next where there are more."""

TIE = 1e-7
"""Errors that differ by less than this part of the layer's output are equal: routers round so, in float32."""

ExpertSet = tuple[int, ...]

Errors = Callable[[Sequence[ExpertSet]], Tensor]
"""``kept experts of each set -> how far the output moves, (S,) float64``; that of no expert is the output's size."""


@dataclass(frozen=True)
class ChosenSet:
    """The experts of one layer that stay, and how they were found."""

    keep: list[int]
    error: float
    """How far the layer's output moves, over its size."""
    tried: int
    """Sets whose error was looked at."""


def count_sets(shape: LayerShape, drop: int) -> int:
    """Sets of experts that can stay when ``drop`` go, as many from each group."""
    return int(comb(shape.group_size, drop // shape.num_groups) ** shape.num_groups)


def is_exact(shape: LayerShape, drop: int) -> bool:
    """Whether all sets are tried, or experts removed one by one."""
    return count_sets(shape, drop) <= EXACT_SETS


def choose_experts(shape: LayerShape, drop: int, errors: Errors) -> ChosenSet:
    """The set with the least error: of all sets, or by ``remove_experts`` where there are more than ``EXACT_SETS``.

    Every group of a group-limited router loses as many. Of equal sets the first in the order of ids is taken. All ranks
    choose the same, since errors are sums over ranks. Raises ``InputError`` when an error is not finite.
    """
    if not is_exact(shape, drop):
        return remove_experts(shape, drop, errors)
    return _best(shape, _all_sets(shape, drop), errors)


def remove_experts(shape: LayerShape, drop: int, errors: Errors) -> ChosenSet:
    """As ``choose_experts``, one expert after another, each time from the ``BEAM`` best sets of one expert more."""
    tried, sets = 0, [tuple(range(shape.num_experts))]
    for turn in range(drop):
        sets = _without_one(shape, sets, drop)
        if turn < drop - 1:
            found = _finite(shape, errors(sets)).tolist()
            tried += len(sets)
            sets = [one for _, one in sorted(zip(found, sets, strict=True))[:BEAM]]
    best = _best(shape, sets, errors)
    return replace(best, tried=best.tried + tried)


def _best(shape: LayerShape, sets: Sequence[ExpertSet], errors: Errors) -> ChosenSet:
    """The best of these sets, given in the order of ids."""
    errors_S = _finite(shape, errors([*sets, ()]))
    size, errors_S = float(errors_S[-1]), errors_S[:-1]
    best = int((errors_S <= errors_S.min() + TIE * size).nonzero()[0])
    return ChosenSet(list(sets[best]), float(errors_S[best]) / size if size else 0.0, len(sets))


def _all_sets(shape: LayerShape, drop: int) -> list[ExpertSet]:
    """Every set of which each group lacks as many, in the order of ids."""
    kept = shape.group_size - drop // shape.num_groups
    groups = [range(first, first + shape.group_size) for first in range(0, shape.num_experts, shape.group_size)]
    return [tuple(chain(*parts)) for parts in product(*(combinations(group, kept) for group in groups))]


def _without_one(shape: LayerShape, sets: Sequence[ExpertSet], drop: int) -> list[ExpertSet]:
    """All that one removal leaves of these sets, from groups that still have more than they will keep."""
    kept = shape.group_size - drop // shape.num_groups
    smaller = set()
    for one in sets:
        counts = [0] * shape.num_groups
        for expert in one:
            counts[expert // shape.group_size] += 1
        smaller |= {
            tuple(other for other in one if other != expert)
            for expert in one
            if counts[expert // shape.group_size] > kept
        }
    return sorted(smaller)


def _finite(shape: LayerShape, errors_S: Tensor) -> Tensor:
    if not bool(errors_S.isfinite().all()):
        raise InputError(f"{shape.name}: the outputs of its experts are not finite; are the weights damaged?")
    return errors_S
