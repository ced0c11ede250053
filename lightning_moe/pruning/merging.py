"""Merging: which kept expert each dropped one joins, and with what weights they are averaged."""

# E experts

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_moe.moe.merged_experts import Groups, Merge
from lightning_moe.stats.similarity import measured_pairs, router_similarity, similarity
from lightning_moe.stats.store import ModelStats

Keep = Mapping[str, Sequence[int]]
"""Layer -> kept experts."""


def merge_alike(stats: ModelStats, keep: Keep) -> Merge:
    """Join each dropped expert to the kept one whose outputs are most like its own (DiEP, App. A.5).

    Weights are the softmax of that likeness; an expert that was seen with no kept one joins none. DiEP says nothing of
    the neurons' order nor of the router: they are aligned, and the kept expert's row stays.
    """
    alike = {one.shape.name: similarity(one).masked_fill(~measured_pairs(one), -1.0) for one in stats.layers}
    return Merge(merge_groups(keep, alike), align=True)


def merge_dominant(stats: ModelStats, keep: Keep) -> Merge:
    """Join each dropped expert to the kept one with the most similar router logits (M-SMoE, arXiv 2310.01334).

    The kept ones are the most used (``euf``, in the order that the budget gives). Neurons are aligned, and averages
    are weighted by how often each expert was used.

    The paper's merged model keeps all rows of the router; ours is smaller, so each group needs one row. Measured for
    this method on 48 windows of validation text, on the two reference models (Mixtral at 25, 50, 75%, fine-grained at
    25, 50%), the perplexity is 96.9, 402, 1495, 58.6, 110 with the kept expert's row; 86.5, 397, 1408, 56.7, 121 with
    the mean by use, and about that with an equal mean or one by routing probability; 78.7, 358, 1311, 53.4, 106 with
    the mean by use stretched to the length of the kept row. That is what ``merged_row`` does.
    """
    groups = {}
    for one in stats.layers:
        members = join_nearest(keep[one.shape.name], router_similarity(one).tolist())
        groups[one.shape.name] = usage_weighted(members, one.count_E.tolist())
    return Merge(groups, align=True, router="mean")


def merge_groups(keep: Keep, similarity: Mapping[str, Tensor]) -> dict[str, dict[int, dict[int, float]]]:
    """Join each dropped expert to the kept one of its layer that it is most like (DiEP, App. A.5).

    ``similarity`` is ``(E, E)`` per layer. The weights of a group are the softmax of its members' similarity with the
    kept one, whose similarity with itself is 1. Of equally similar ones the lower id is taken. A negative similarity
    says that the pair was never seen together; an expert that was seen with no kept one joins none.

    Returns layer -> kept expert -> expert -> weight, by id, for those that others join.
    """
    merge: dict[str, dict[int, dict[int, float]]] = {}
    for name, kept in keep.items():
        alike_EE = similarity[name].tolist()
        nearest = join_nearest(kept, alike_EE)
        members = {expert: [i for i in joined if alike_EE[i][expert] >= 0] for expert, joined in nearest.items()}
        groups = {expert: _softmax_weights(expert, joined, alike_EE) for expert, joined in members.items() if joined}
        if groups:
            merge[name] = groups
    return merge


def join_nearest(kept: Iterable[int], alike_EE: Sequence[Sequence[float]]) -> dict[int, list[int]]:
    """The other experts that are most like each kept one, by id; of equally similar ones the lower id is taken."""
    members: dict[int, list[int]] = {expert: [] for expert in sorted(kept)}
    for expert, alike_E in enumerate(alike_EE):
        if expert not in members:
            members[max(members, key=alike_E.__getitem__)].append(expert)  # the first of equals, and ids ascend
    return members


def usage_weighted(members: Mapping[int, Sequence[int]], count_E: Sequence[float]) -> Groups:
    """Groups whose experts weigh as much as they were used; equally where none was."""
    groups = {}
    for kept, joined in members.items():
        if joined:
            group = sorted([kept, *joined])
            total = sum(count_E[expert] for expert in group)
            groups[kept] = {expert: count_E[expert] / total if total else 1 / len(group) for expert in group}
    return groups


def _softmax_weights(kept: int, joined: Sequence[int], alike_EE: Sequence[Sequence[float]]) -> dict[int, float]:
    alike = torch.tensor([1.0, *(alike_EE[expert][kept] for expert in joined)], dtype=torch.float64)
    weights = dict(zip([kept, *joined], alike.softmax(0).tolist(), strict=True))
    return dict(sorted(weights.items()))
