"""Merging: which kept expert each dropped one is most like, and with what weights they are averaged."""

# E experts

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def merge_groups(
    keep: Mapping[str, Sequence[int]], similarity: Mapping[str, Tensor]
) -> dict[str, dict[int, dict[int, float]]]:
    """Join each dropped expert to the kept one of its layer that it is most like (DiEP, App. A.5).

    ``similarity`` is ``(E, E)`` per layer. The weights of a group are the softmax of its members' similarity with the
    kept one, whose similarity with itself is 1. Of equally similar ones the lower id is taken. A negative similarity
    says that the pair was never seen together; an expert that was seen with no kept one joins none.

    Returns layer -> kept expert -> expert -> weight, by id, for those that others join.
    """
    merge: dict[str, dict[int, dict[int, float]]] = {}
    for name, kept in keep.items():
        alike_EE = similarity[name].tolist()
        members: dict[int, list[int]] = {expert: [] for expert in sorted(kept)}
        for expert in range(len(alike_EE)):
            if expert not in members:
                nearest = _most_alike(members, alike_EE[expert])
                if alike_EE[expert][nearest] >= 0:
                    members[nearest].append(expert)
        groups = {expert: _weights(expert, joined, alike_EE) for expert, joined in members.items() if joined}
        if groups:
            merge[name] = groups
    return merge


def _most_alike(kept: Iterable[int], alike_E: Sequence[float]) -> int:
    return max(kept, key=lambda other: alike_E[other])  # the first of equals, and ids ascend


def _weights(kept: int, joined: Sequence[int], alike_EE: Sequence[Sequence[float]]) -> dict[int, float]:
    alike = torch.tensor([1.0, *(alike_EE[expert][kept] for expert in joined)], dtype=torch.float64)
    weights = dict(zip([kept, *joined], alike.softmax(0).tolist(), strict=True))
    return dict(sorted(weights.items()))
