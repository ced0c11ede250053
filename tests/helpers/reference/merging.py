"""Merging of experts, expert by expert (DiEP, M-SMoE 2310.01334, S-SMoE 2407.09590)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from tests.helpers.reference.vectors import Vector, dot, mean, norm


def mean_experts(experts: nn.Module, weights: dict[int, float]) -> dict[str, Tensor]:
    """The weighted mean of some experts, tensor by tensor, in float64; ids and weights as a plan has them."""
    return {
        name: torch.stack([weight * stack.detach()[expert].double() for expert, weight in weights.items()]).sum(0)
        for name, stack in experts.named_parameters(recurse=False)
    }


def merge_groups(kept: Sequence[int], alike: Sequence[Sequence[float]]) -> dict[int, dict[int, float]]:
    """Of one layer, expert by expert: who joins whom, and with what weight (DiEP, App. A.5)."""
    groups: dict[int, dict[int, float]] = {}
    for expert in range(len(alike)):
        if expert in kept:
            continue
        best = kept[0]
        for other in kept:
            if alike[other][expert] > alike[best][expert]:
                best = other
        groups.setdefault(best, {best: math.exp(1.0)})[expert] = math.exp(alike[best][expert])
    for group in groups.values():
        total = sum(group.values())
        for expert in group:
            group[expert] /= total
    return groups


def usage_weights(groups: Mapping[int, Sequence[int]], used: Sequence[float]) -> dict[int, dict[int, float]]:
    """Groups of more than one expert, by the one that is kept, with the share of the use of each."""
    return {
        kept: {expert: used[expert] / sum(used[i] for i in group) for expert in sorted(group)}
        for kept, group in groups.items()
        if len(group) > 1
    }


def dominant_groups(
    kept: Sequence[int], logits: Sequence[Vector], used: Sequence[float]
) -> dict[int, dict[int, float]]:
    """M-SMoE's groups of one layer, from the logits of every token: ``logits[t][expert]``."""
    columns = list(zip(*logits, strict=True))
    groups = {expert: [expert] for expert in kept}
    for expert in range(len(columns)):
        if expert not in kept:
            alike = {
                other: dot(columns[expert], columns[other]) / norm(columns[expert]) / norm(columns[other])
                for other in kept
            }
            groups[max(kept, key=alike.__getitem__)].append(expert)
    return usage_weights(groups, used)


def clusters(unlike: Sequence[Sequence[float]], count: int, within: int) -> list[set[int]]:
    """``count`` clusters in each run of ``within`` experts, by average linkage over all pairs, each time anew."""
    found = []
    for first in range(0, len(unlike), within):
        groups = [{expert} for expert in range(first, first + within)]
        while len(groups) > count:
            one, other = min(
                combinations(groups, 2), key=lambda pair: mean([unlike[i][j] for i in pair[0] for j in pair[1]])
            )
            groups = [group for group in groups if group not in (one, other)] + [one | other]
        found += groups
    return found
