"""Who joins whom, and with what weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.merging import merge_dominant, merge_groups, usage_weighted
from lightning_moe.pruning.scores import score_experts
from lightning_moe.stats.store import ModelStats
from tests.helpers.random_layers import likeness, random_layer, stats_of
from tests.helpers.reference import merging as reference

LAYER = "model.layers.0.mlp"


@settings(max_examples=60, deadline=None)
@given(num_experts=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_groups_equal_a_slow_reference(num_experts: int, seed: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))
    alike_EE = likeness(num_experts, seed)
    groups = merge_groups({LAYER: kept}, {LAYER: alike_EE}).get(LAYER, {})
    expected = reference.merge_groups(kept, alike_EE.tolist())
    assert groups.keys() == expected.keys()
    for expert, group in groups.items():
        assert group == pytest.approx(expected[expert], abs=1e-12)
        assert list(group) == sorted(group) and expert in group and len(group) > 1
        assert sum(group.values()) == pytest.approx(1, abs=1e-12)
        assert group[expert] == max(group.values())  # nothing is more like it than itself
    joined = [expert for kept, group in groups.items() for expert in group if expert != kept]
    assert sorted([*joined, *kept]) == list(range(num_experts))


def test_by_hand() -> None:
    """Expert 1 is most like 3, expert 2 most like 0; e^0.5 = 1.6487, e^1 = 2.7183: 0.3775 and 0.6225."""
    alike_EE = torch.eye(4)
    alike_EE[1, 3] = alike_EE[3, 1] = 0.5
    alike_EE[2, 0] = alike_EE[0, 2] = 0.25
    (groups,) = merge_groups({LAYER: [0, 3]}, {LAYER: alike_EE}).values()
    assert list(groups) == [0, 3]
    assert groups[3] == pytest.approx({1: 0.3775, 3: 0.6225}, abs=1e-4)
    assert groups[0] == pytest.approx({0: 0.6792, 2: 0.3208}, abs=1e-4)


def test_of_equals_the_lower_id() -> None:
    groups = merge_groups({LAYER: [2, 5, 7]}, {LAYER: torch.ones(8, 8)})[LAYER]
    assert list(groups) == [2] and list(groups[2]) == [0, 1, 2, 3, 4, 6]
    assert list(groups[2].values()) == pytest.approx([1 / 6] * 6)


def test_an_expert_seen_with_no_kept_one_joins_none() -> None:
    alike_EE = torch.full((4, 4), -1.0).fill_diagonal_(1.0)
    assert merge_groups({LAYER: [1, 2]}, {LAYER: alike_EE}) == {}
    alike_EE[0, 2] = alike_EE[2, 0] = 0.0
    assert list(merge_groups({LAYER: [1, 2]}, {LAYER: alike_EE})[LAYER]) == [2]


def test_a_whole_layer_has_no_groups() -> None:
    assert merge_groups({LAYER: range(4)}, {LAYER: torch.eye(4)}) == {}


def test_renaming_the_experts_renames_the_groups() -> None:
    alike_EE, order = likeness(8, 3), torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    new = {old: place for place, old in enumerate(order)}
    kept = [0, 3, 6]
    groups = merge_groups({LAYER: kept}, {LAYER: alike_EE})[LAYER]
    renamed = merge_groups({LAYER: sorted(new[i] for i in kept)}, {LAYER: alike_EE[order][:, order]})[LAYER]
    assert renamed.keys() == {new[i] for i in groups}
    for expert, group in groups.items():
        assert renamed[new[expert]] == pytest.approx({new[i]: weight for i, weight in group.items()})


def test_m_smoe_joins_the_dominant_expert_with_the_nearest_logits() -> None:
    """By the cosine of the logits over all tokens, weighted by use; the dominant ones are the most used."""
    raw = random_layer(0, num_experts=6)
    stats = ModelStats("tiny", "data", [stats_of(raw)])
    name = stats.layers[0].shape.name
    logits = [[math.log(p) for p in token.probabilities] for token in raw.tokens]
    used = stats.layers[0].count_E.tolist()
    keep = make_plan(score_experts(stats, "euf"), 0.5, "layer").keep
    assert keep[name] == sorted(sorted(range(6), key=lambda i: (-used[i], i))[:3])
    merge = merge_dominant(stats, keep)
    expected = reference.dominant_groups(keep[name], logits, used)
    assert merge.groups[name].keys() == expected.keys()
    assert all(merge.groups[name][kept] == pytest.approx(expected[kept]) for kept in expected)
    assert merge.settings == {"align": True, "router": "mean"}


def test_experts_that_were_never_used_weigh_the_same() -> None:
    assert usage_weighted({2: [0, 1], 3: []}, [0.0, 0.0, 0.0, 5.0]) == {2: {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}}
    assert usage_weighted({0: [1]}, [3.0, 1.0]) == {0: {0: 0.75, 1: 0.25}}
