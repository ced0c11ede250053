"""S-SMoE: which experts are grouped, however many groups the budget leaves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.clustering import cluster_scores, join_all, merge_clusters
from lightning_moe.stats.similarity import similarity
from lightning_moe.stats.store import ModelStats
from tests.helpers.random_layers import likeness, permuted, random_layer, stats_of
from tests.helpers.reference import merging as reference

NUM_EXPERTS = 6


def some_stats(num_layers: int = 2, num_groups: int = 1) -> ModelStats:
    """Layers of 6 experts whose outputs are alike by chance."""
    layers = []
    for index in range(num_layers):
        layer = stats_of(random_layer(index, num_experts=NUM_EXPERTS), index)
        shape = replace(layer.shape, num_groups=num_groups, top_k=1)
        alike_EE = likeness(NUM_EXPERTS, index)
        hsic_EE, own_EE = alike_EE.clone().fill_diagonal_(0.0), torch.ones_like(alike_EE).fill_diagonal_(0.0)
        layers.append(replace(layer, shape=shape, hsic_EE=hsic_EE, own_hsic_EE=own_EE))
    return ModelStats("tiny", "data", layers)


@settings(max_examples=60)
@given(groups=st.integers(1, 3), within=st.integers(1, 6), seed=st.integers(0, 99))
def test_joining_equals_a_slow_reference(groups: int, within: int, seed: int) -> None:
    """At every number of clusters; heights never fall."""
    unlike_EE = 1 - likeness(groups * within, seed)
    used = torch.randperm(groups * within, generator=torch.Generator().manual_seed(seed)).tolist()
    steps = join_all(unlike_EE, used, within)
    assert len(steps) == groups * (within - 1)
    for count in range(1, within + 1):
        clusters = {expert: {expert} for expert in range(groups * within)}
        for first in range(0, groups * within, within):
            own = [step for step in steps if step.kept // within == first // within]
            assert all(one.height <= other.height + 1e-12 for one, other in pairwise(own))
            for step in own[: within - count]:
                clusters[step.kept] |= clusters.pop(step.gone)
        expected = reference.clusters(unlike_EE.tolist(), count, within)
        assert sorted(map(sorted, clusters.values())) == sorted(map(sorted, expected))
        assert all(kept == max(cluster, key=lambda i: used[i]) for kept, cluster in clusters.items())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [1 / 3, 0.5, 2 / 3])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_budget_keeps_the_most_used_of_each_cluster(scope: Scope, ratio: float, num_groups: int) -> None:
    stats = some_stats(num_groups=num_groups)
    if num_groups > 1 and ratio > 0.4:
        return  # its router needs two experts of each group of three
    plan = make_plan(cluster_scores(stats), ratio, scope)
    merge = merge_clusters(stats, plan.keep)
    assert merge.align and merge.router == "mean"
    heights = []
    for layer in stats.layers:
        kept, used = plan.keep[layer.shape.name], layer.count_E.tolist()
        unlike = (1 - similarity(layer)).tolist()
        clusters = reference.clusters(unlike, len(kept) // num_groups, layer.shape.group_size)
        most = {max(sorted(cluster), key=lambda i: used[i]): sorted(cluster) for cluster in clusters}
        assert sorted(most) == kept
        expected = reference.usage_weights(most, used)
        found = merge.groups[layer.shape.name]
        assert found.keys() == expected.keys()
        assert all(found[expert] == pytest.approx(expected[expert]) for expert in found)
        heights += [float(cluster_scores(stats).scores[layer.shape.name][i]) for i in range(6) if i not in kept]
    if scope == "global" and num_groups == 1:  # all layers are cut at one height
        scores = cluster_scores(stats).scores
        kept_scores = [float(scores[name][i]) for name, ids in plan.keep.items() for i in ids]
        assert max(heights) <= min(kept_scores)


def test_renaming_the_experts_renames_the_groups() -> None:
    stats = some_stats(num_layers=1)
    (layer,) = stats.layers
    layer = replace(layer, count_E=torch.tensor([5.0, 3.0, 8.0, 1.0, 7.0, 2.0], dtype=torch.float64))
    order = [3, 0, 5, 1, 4, 2]
    turned = replace(stats, layers=[permuted(layer, order)])
    scores = cluster_scores(replace(stats, layers=[layer])).scores[layer.shape.name]
    torch.testing.assert_close(cluster_scores(turned).scores[layer.shape.name], scores[order])


def test_equally_alike_experts_are_dropped_in_the_order_of_joining() -> None:
    """Rounding and ties must not let a budget keep two of a cluster: scores rise strictly."""
    stats = some_stats(num_layers=1)
    (layer,) = stats.layers
    same = replace(layer, hsic_EE=torch.full_like(layer.hsic_EE, 0.5).fill_diagonal_(0.0))
    scores = cluster_scores(replace(stats, layers=[same])).scores[layer.shape.name]
    assert len(set(scores.tolist())) == NUM_EXPERTS
    for ratio in (1 / 6, 0.5, 5 / 6):
        keep = make_plan(cluster_scores(replace(stats, layers=[same])), ratio, "layer").keep
        groups = merge_clusters(replace(stats, layers=[same]), keep).groups[layer.shape.name]
        assert set(groups) <= set(keep[layer.shape.name])


def test_by_hand() -> None:
    """0 and 1 are nearest (0.1); then 2 joins 3 (0.2); the clusters are (0.5 + 0.6 + 0.7 + 0.8) / 4 = 0.65 apart."""
    unlike = torch.tensor(
        [[0.0, 0.1, 0.5, 0.6], [0.1, 0.0, 0.7, 0.8], [0.5, 0.7, 0.0, 0.2], [0.6, 0.8, 0.2, 0.0]], dtype=torch.float64
    )
    steps = join_all(unlike, [4, 2, 1, 3], 4)
    assert [(step.kept, step.gone) for step in steps] == [(0, 1), (3, 2), (0, 3)]
    assert [step.height for step in steps] == pytest.approx([0.1, 0.2, 0.65])
