"""From scores to a plan: exact counts, floors, ties, groups."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.scores import ExpertScores
from tests.helpers.layer_scores import SCOPES, kept, scores_of


def dropped(scores: ExpertScores, keep: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    return {
        (layer, expert)
        for layer, (shape, ids) in enumerate(zip(scores.shapes, keep, strict=True))
        for expert in range(shape.num_experts)
        if expert not in ids
    }


def rounded(percent: int, count: int) -> int:
    """Half rounds up, in exact arithmetic."""
    return int(Fraction(percent, 100) * count + Fraction(1, 2))


# ------------------------------------------------------------------------------- the obvious, one at a time


def slow_layer(values: Sequence[Sequence[float]], percent: int) -> list[list[int]]:
    keep = []
    for row in values:
        left = list(range(len(row)))
        for _ in range(rounded(percent, len(row))):
            left.remove(min(left, key=lambda expert: (row[expert], -expert)))
        keep.append(left)
    return keep


def slow_global(values: Sequence[Sequence[float]], percent: int, floors: Sequence[int]) -> list[list[int]]:
    """Of equal scores the lower layer, then the lower id, stays."""
    keep = [list(range(len(row))) for row in values]
    for _ in range(rounded(percent, sum(len(row) for row in values))):
        candidates = [
            (values[layer][expert], -layer, -expert)
            for layer, left in enumerate(keep)
            for expert in left
            if len(left) > floors[layer]
        ]
        _, layer, expert = min(candidates)
        keep[-layer].remove(-expert)
    return keep


rows_of_scores = st.integers(2, 9).flatmap(
    lambda count: st.lists(st.integers(0, 4).map(float), min_size=count, max_size=count)
)
"""Layers of different sizes; whole numbers, so that many tie."""
layers_of_scores = st.lists(rows_of_scores, min_size=1, max_size=5)
percents = st.integers(1, 99)


@given(values=layers_of_scores, percent=percents, top_k=st.integers(1, 3))
def test_layer_scope_drops_the_lowest_of_each_layer(values: list[list[float]], percent: int, top_k: int) -> None:
    counts = [rounded(percent, len(row)) for row in values]
    scores = scores_of(values, top_k)
    if all(1 <= count <= len(row) - top_k for count, row in zip(counts, values, strict=True)):
        found = kept(scores, percent / 100, "layer")
        assert found == slow_layer(values, percent)
        assert [len(row) - len(ids) for row, ids in zip(values, found, strict=True)] == counts
    else:
        with pytest.raises(InputError):
            make_plan(scores, percent / 100, "layer")


@given(values=layers_of_scores, percent=percents, data=st.data())
def test_global_scope_drops_the_lowest_of_all(values: list[list[float]], percent: int, data: st.DataObject) -> None:
    top_ks = [data.draw(st.integers(1, len(row))) for row in values]
    floor = data.draw(st.none() | st.integers(0, min(len(row) for row in values)))
    floors = [max(top_k, floor or 0) for top_k in top_ks]
    total = sum(len(row) for row in values)
    count = rounded(percent, total)
    scores = scores_of(values, top_ks)
    if 1 <= count <= total - sum(floors):
        found = kept(scores, percent / 100, "global", floor)
        assert found == slow_global(values, percent, floors)
        assert total - sum(len(ids) for ids in found) == count
        assert all(len(ids) >= fewest for ids, fewest in zip(found, floors, strict=True))
    else:
        with pytest.raises(InputError):
            make_plan(scores, percent / 100, "global", floor)


@pytest.mark.parametrize("scope", SCOPES)
@given(values=layers_of_scores, one=percents, other=percents)
def test_a_higher_ratio_drops_these_and_more(scope: Scope, values: list[list[float]], one: int, other: int) -> None:
    scores = scores_of(values)
    plans = []
    for percent in sorted((one, other)):
        try:
            plans.append(dropped(scores, kept(scores, percent / 100, scope)))
        except InputError:
            assume(False)
    assert plans[0] <= plans[1]


@pytest.mark.parametrize("scope", SCOPES)
def test_of_equal_scores_the_lower_id_stays(scope: Scope) -> None:
    scores = scores_of([[1.0] * 8] * 2)
    assert kept(scores, 0.25, "layer") == [[0, 1, 2, 3, 4, 5]] * 2
    assert kept(scores, 0.25, "global") == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]]
    assert kept(scores, 0.5, scope) == kept(scores, 0.5, scope)


@given(values=layers_of_scores, percent=percents, shift=st.floats(-5, 5), scale=st.sampled_from([0.25, 2.0, 8.0]))
def test_only_the_order_of_scores_counts(values: list[list[float]], percent: int, shift: float, scale: float) -> None:
    """No group-limited router here: there means of scores are compared."""
    moved = [[scale * value + float(round(shift)) for value in row] for row in values]
    for scope in SCOPES:
        try:
            expected = kept(scores_of(values), percent / 100, scope)
        except InputError:
            continue
        assert kept(scores_of(moved), percent / 100, scope) == expected


def test_ratios_round_as_people_count() -> None:
    """0.29 of 100 is 29 although the float is below; half an expert is a whole one: 0.25 of 10 drops 3."""
    scores = scores_of([[float(i) for i in range(100)]])
    assert len(kept(scores, 0.29, "layer")[0]) == 71
    assert len(kept(scores, 0.57, "layer")[0]) == 43
    assert len(kept(scores_of([[float(i) for i in range(10)]]), 0.25, "layer")[0]) == 7
    assert len(kept(scores_of([[float(i) for i in range(10)]]), 0.25, "global")[0]) == 7


def test_by_hand() -> None:
    """Layer 0 scores 1 2 3 4, layer 1 scores 10 0 30 40, top-1; half of 8 is 4.

    By layer, two each: 1 and 2 go in layer 0; 0 and 10 in layer 1. Over all: 0, 1, 2, 3 go, which leaves one expert
    in layer 0; with a floor of 2 the 3 stays and the 10 goes.
    """
    scores = scores_of([[1, 2, 3, 4], [10, 0, 30, 40]])
    assert kept(scores, 0.5, "layer") == [[2, 3], [2, 3]]
    assert kept(scores, 0.5, "global") == [[3], [0, 2, 3]]
    assert kept(scores, 0.5, "global", floor=2) == [[2, 3], [2, 3]]


def test_a_floor_below_top_k_does_not_lower_it() -> None:
    scores = scores_of([[1, 2, 3, 4], [10, 20, 30, 40]], top_k=2)
    assert kept(scores, 0.25, "global", floor=1) == [[2, 3], [0, 1, 2, 3]]
    assert kept(scores, 0.5, "global", floor=1) == [[2, 3], [2, 3]]


def test_the_plan_says_how_it_was_made() -> None:
    plan = make_plan(scores_of([[1, 2, 3, 4]], seed=7), 0.5, "layer")
    assert plan.made_by == {
        "method": "reap",
        "direction": "min",
        "seed": 7,
        "ratio": 0.5,
        "scope": "layer",
        "floor": None,
    }


# ------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("scope", SCOPES)
@given(data=st.data(), groups=st.integers(2, 4), size=st.integers(3, 6), layers=st.integers(1, 3), percent=percents)
def test_groups_lose_the_same(
    scope: Scope, data: st.DataObject, groups: int, size: int, layers: int, percent: int
) -> None:
    row = st.lists(st.integers(0, 9).map(float), min_size=groups * size, max_size=groups * size)
    values = [data.draw(row) for _ in range(layers)]
    topk_group = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, topk_group * size))
    scores = scores_of(values, top_k, groups, topk_group)
    try:
        found = kept(scores, percent / 100, scope)
    except InputError:
        return
    for ids, row_scores in zip(found, values, strict=True):
        lost = []
        for first in range(0, groups * size, size):
            group = list(range(first, first + size))
            gone = [expert for expert in group if expert not in ids]
            lost.append(len(gone))
            # within a group the lowest go, of equal ones the higher id
            order = sorted(group, key=lambda expert: (row_scores[expert], -expert))
            assert set(gone) == set(order[: len(gone)])
        assert len(set(lost)) == 1
        assert size - lost[0] >= max(2, -(-top_k // topk_group))
        if scope == "layer":
            assert lost[0] == rounded(percent, size)
    if scope == "global":
        total = layers * groups * size
        count = total - sum(len(ids) for ids in found)
        wanted = rounded(percent, total)
        assert count == wanted // groups * groups  # whole slices, never more than was asked


@given(data=st.data(), one=percents, other=percents)
def test_a_higher_ratio_drops_these_and_more_in_groups(data: st.DataObject, one: int, other: int) -> None:
    row = st.lists(st.integers(0, 9).map(float), min_size=8, max_size=8)
    scores = scores_of([data.draw(row) for _ in range(3)], 2, 2, 2)
    for scope in SCOPES:
        plans = []
        for percent in sorted((one, other)):
            try:
                plans.append(dropped(scores, kept(scores, percent / 100, scope)))
            except InputError:
                break
        assert len(plans) < 2 or plans[0] <= plans[1]


def test_groups_by_hand() -> None:
    """Two groups of four. Lowest pairs: 1 with 5 (mean of 0 and 4: 2), then 0 with 6 (1 and 5: 3), ...
    In layer 1 every score is 2.5: its slices stand between those two."""
    scores = scores_of([[1, 0, 8, 9, 7, 4, 5, 6], [2.5] * 8], 2, 2, 1)
    assert kept(scores, 0.25, "layer") == [[0, 2, 3, 4, 6, 7], [0, 1, 2, 4, 5, 6]]
    assert kept(scores, 2 / 16, "global") == [[0, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert kept(scores, 4 / 16, "global") == [[0, 2, 3, 4, 6, 7], [0, 1, 2, 4, 5, 6]]
    assert kept(scores, 6 / 16, "global") == [[0, 2, 3, 4, 6, 7], [0, 1, 4, 5]]
    assert kept(scores, 8 / 16, "global") == [[2, 3, 4, 7], [0, 1, 4, 5]]
