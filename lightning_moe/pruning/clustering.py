"""Clustering: the experts of a layer, two groups joined at a time, until as many are left as the budget says."""

# E experts

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.merged_experts import Merge
from lightning_moe.pruning.merging import Keep, usage_weighted
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.similarity import similarity
from lightning_moe.stats.store import ModelStats


@dataclass(frozen=True)
class Joining:
    """One step: the group of ``gone`` joins that of ``kept``; each is the most used expert of its group."""

    kept: int
    gone: int
    height: float
    """How unlike the two groups are: never less than in the step before."""


def join_all(unlike_EE: Tensor, count_E: Sequence[float], within: int) -> list[Joining]:
    """Join the two groups that are least unlike, again and again, until one is left: average linkage.

    ``within`` is the size of the router's groups; only experts of the same one are joined. Groups are as unlike as
    their experts are on average, which is the paper's aim of high likeness within groups; ties go to the lower ids.
    """
    num_experts = len(count_E)
    place_E = torch.arange(num_experts) // within
    apart_EE = unlike_EE.masked_fill((place_E[:, None] != place_E).fill_diagonal_(True), torch.inf)
    size_E = [1] * num_experts
    joinings: list[Joining] = []
    for _ in range(num_experts - num_experts // within):
        pair = divmod(int(apart_EE.argmin()), num_experts)
        kept, gone = sorted(pair, key=lambda expert: (-count_E[expert], expert))
        joinings.append(Joining(kept, gone, float(apart_EE[pair])))
        # The mean over pairs of the joined group follows from those of its halves.
        size_E[kept], share = size_E[kept] + size_E[gone], size_E[gone] / (size_E[kept] + size_E[gone])
        apart_EE[kept] += share * (apart_EE[gone] - apart_EE[kept]).nan_to_num(0.0, 0.0, 0.0)
        apart_EE[kept, kept] = torch.inf
        apart_EE[:, kept] = apart_EE[kept]
        apart_EE[gone] = apart_EE[:, gone] = torch.inf
    return joinings


def cluster_scores(stats: ModelStats) -> ExpertScores:
    """Scores by which any budget keeps one expert per group, the most used (S-SMoE, arXiv 2407.09590).

    The score is how unlike (1 - CKA) the two groups are when the expert's own group joins another one that is used
    more: what is dropped first is most alike. So a ratio cuts the tree of joinings at some height: within each layer
    under scope layer, all layers at the same height under scope global.
    """
    scores = {}
    for layer in stats.layers:
        score_E = torch.full((layer.shape.num_experts,), 2.0, dtype=torch.float64)  # the last one joins none
        before = dict.fromkeys(range(layer.shape.num_groups), -math.inf)
        for step in _joinings(layer):
            group = step.gone // layer.shape.group_size
            # The order of steps decides, also where two are equally high or rounding makes a later one lower.
            before[group] = max(step.height, math.nextafter(before[group], math.inf))
            score_E[step.gone] = before[group]
        scores[layer.shape.name] = score_E
    shapes: list[LayerShape] = [layer.shape for layer in stats.layers]
    return ExpertScores(stats.model_id, stats.data_fingerprint, "s-smoe", shapes, scores)


def merge_clusters(stats: ModelStats, keep: Keep) -> Merge:
    """The groups of which ``keep`` names the most used experts, averaged by usage, the router's rows along with them.

    The paper merges "the experts along with the routers" of a group; on aligning neurons it is silent, and we do.
    """
    groups = {}
    for layer in stats.layers:
        kept = set(keep[layer.shape.name])
        members: dict[int, list[int]] = {expert: [] for expert in range(layer.shape.num_experts)}
        for step in _joinings(layer):
            if step.gone not in kept:
                members[step.kept] += [step.gone, *members.pop(step.gone)]
        groups[layer.shape.name] = usage_weighted(members, layer.count_E.tolist())
    return Merge(groups, align=True, router="mean")


def _joinings(layer: LayerStats) -> list[Joining]:
    return join_all(1.0 - similarity(layer), layer.count_E.tolist(), layer.shape.group_size)
