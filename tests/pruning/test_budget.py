"""From scores to a plan: exact counts, floors, ties, groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.surgery import check_keep
from lightning_moe.pruning.budget import Scope, blank_scores, make_plan
from lightning_moe.pruning.plan import compose, cut_shapes
from lightning_moe.pruning.scores import ExpertScores

SCOPES: tuple[Scope, Scope] = ("layer", "global")


def scores_of(
    values: Sequence[Sequence[float]],
    top_k: int | Sequence[int] = 1,
    num_groups: int = 1,
    topk_group: int = 1,
    **settings: Any,
) -> ExpertScores:
    """Layers 0, 1, 2 ... with these scores."""
    top_ks = [top_k] * len(values) if isinstance(top_k, int) else top_k
    shapes = [
        LayerShape(f"model.layers.{i}.mlp", i, len(row), k, num_groups, topk_group)
        for i, (row, k) in enumerate(zip(values, top_ks, strict=True))
    ]
    tensors = {shape.name: torch.tensor(row, dtype=torch.float64) for shape, row in zip(shapes, values, strict=True)}
    return ExpertScores("tiny@01", "data@23", "reap", shapes, tensors, settings={"direction": "min", **settings})


def kept(scores: ExpertScores, ratio: float, scope: Scope, floor: int | None = None) -> list[list[int]]:
    """Kept ids per layer, after what every plan must hold."""
    plan = make_plan(scores, ratio, scope, floor)
    assert list(plan.keep) == [shape.name for shape in scores.shapes]
    check_keep(scores.shapes, plan.keep)
    for ids in plan.keep.values():
        assert ids == sorted(ids) and all(type(i) is int for i in ids)
    assert (plan.model_id, plan.data_fingerprint) == ("tiny@01", "data@23")
    return list(plan.keep.values())


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


# ------------------------------------------------------------------------------------------------- rounds

Keep = dict[str, list[int]]
Drawn = tuple[list[ExpertScores], list[float], int | None]


def left_of(scores: ExpertScores, keep: Mapping[str, Sequence[int]]) -> ExpertScores:
    """The same scores once only the experts in ``keep`` are left."""
    values = {name: scores.scores[name][list(ids)] for name, ids in keep.items()}
    return replace(scores, shapes=cut_shapes(scores.shapes, keep), scores=values)


def in_rounds(scores: Sequence[ExpertScores], ratios: Sequence[float], scope: Scope, floor: int | None) -> list[Keep]:
    """What is kept after each round, by ids in the whole model; ``scores`` are of all its experts, anew each round."""
    whole = scores[0].shapes
    keeps = [{shape.name: list(range(shape.num_experts)) for shape in whole}]
    for now, ratio in zip(scores, ratios, strict=True):
        left = left_of(now, keeps[-1])
        plan = make_plan(left, ratio, scope, floor, whole=whole)
        check_keep(left.shapes, plan.keep)
        keeps.append(compose(keeps[-1], plan.keep))
    return keeps[1:]


@st.composite
def rounds_of_scores(draw: st.DrawFn, constant: bool = False) -> Drawn:
    """Layers, ascending ratios, scores for each round (or the same in all), and a floor; some of them impossible."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    if groups == 1:
        sizes = draw(st.lists(st.integers(4, 9), min_size=1, max_size=4))
        ratios = sorted(one / 100 for one in draw(st.sets(st.integers(15, 65), min_size=2, max_size=4)))
    else:  # layers of one size, and shares that its groups can bear
        sizes = [draw(st.integers(4, 6))] * draw(st.integers(1, 3))
        ratios = sorted(one / sizes[0] for one in draw(st.sets(st.integers(1, sizes[0] - 2), min_size=2, max_size=3)))
    topk_group = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, 2 * topk_group))
    floor = draw(st.none() | st.integers(1, 3))
    rows = st.tuples(*(st.lists(st.integers(0, 4), min_size=n * groups, max_size=n * groups) for n in sizes))
    tables = [draw(rows)] * len(ratios) if constant else [draw(rows) for _ in ratios]
    return [scores_of(table, top_k, groups, topk_group) for table in tables], ratios, floor


@pytest.mark.parametrize("scope", SCOPES)
@given(drawn=rounds_of_scores())
def test_rounds_end_with_the_counts_of_one_cut(scope: Scope, drawn: Drawn) -> None:
    """Whatever the scores of each round; in every round fewer experts are left than before, and all were there."""
    scores, ratios, floor = drawn
    try:
        keeps = in_rounds(scores, ratios, scope, floor)
    except InputError:
        assume(False)
    for keep, ratio in zip(keeps, ratios, strict=True):
        counts = {name: len(ids) for name, ids in keep.items()}
        once = {name: len(ids) for name, ids in make_plan(scores[0], ratio, scope, floor).keep.items()}
        assert counts == once if scope == "layer" else sum(counts.values()) == sum(once.values())
        check_keep(scores[0].shapes, keep)
    for before, after in pairwise(keeps):
        assert all(set(after[name]) <= set(ids) for name, ids in before.items())
        assert before != after


@pytest.mark.parametrize("scope", SCOPES)
@given(drawn=rounds_of_scores(constant=True))
def test_rounds_on_scores_that_stay_are_one_cut(scope: Scope, drawn: Drawn) -> None:
    scores, ratios, floor = drawn
    try:
        keeps = in_rounds(scores, ratios, scope, floor)
    except InputError:
        assume(False)
    assert keeps == [make_plan(scores[0], ratio, scope, floor).keep for ratio in ratios]


@pytest.mark.parametrize("scope", SCOPES)
@given(drawn=rounds_of_scores())
def test_the_first_round_is_a_cut_of_the_whole(scope: Scope, drawn: Drawn) -> None:
    scores, ratios, floor = drawn
    plans: list[object] = []
    for whole in (None, scores[0].shapes):
        try:
            plans.append(make_plan(scores[0], ratios[0], scope, floor, whole))
        except InputError as refused:
            plans.append(str(refused))
    assert plans[0] == plans[1]


def test_rounds_by_hand() -> None:
    """Layers of 4 and 8 experts. 0.25 drops 1 and 2 of them; 0.45 makes that 2 (1.8) and 4 (3.6); 0.55 2 (2.2) and
    4 (4.4): nothing more, and is refused; 0.6 2 (2.4) and 5 (4.8), and spares the first layer."""
    scores = scores_of([[1, 2, 3, 4], [8, 7, 6, 5, 4, 3, 2, 1]])
    whole, (first, second) = scores.shapes, (shape.name for shape in scores.shapes)
    keep = make_plan(scores, 0.25, "layer", whole=whole).keep
    assert keep == {first: [1, 2, 3], second: [0, 1, 2, 3, 4, 5]}
    now = make_plan(left_of(scores, keep), 0.45, "layer", whole=whole).keep
    assert now == {first: [1, 2], second: [0, 1, 2, 3]}  # places among those left
    keep = compose(keep, now)
    assert keep == {first: [2, 3], second: [0, 1, 2, 3]}
    with pytest.raises(InputError, match=r"--ratio 0\.55 drops nothing more than the rounds before"):
        make_plan(left_of(scores, keep), 0.55, "layer", whole=whole)
    assert make_plan(left_of(scores, keep), 0.6, "layer", whole=whole).keep == {first: [0, 1], second: [0, 1, 2]}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_refused_round_names_shares_of_the_whole(scope: Scope) -> None:
    """Of 8 experts 4 are left, top-2: 2 more can go, and with them 5 or 6 of 8 are gone."""
    whole = scores_of([[1.0] * 8] * 2, top_k=2)
    left = blank_scores(cut_shapes(whole.shapes, {shape.name: range(4) for shape in whole.shapes}))
    for ratio in (0.25, 0.9):
        with pytest.raises(InputError) as refused:
            make_plan(left, ratio, scope, whole=whole.shapes)
        named = str(refused.value).partition("possible ratios: ")[2].rstrip(".").split(", ")
        assert [named[0], named[-1]] == (["0.625", "0.75"] if scope == "layer" else ["0.5625", "0.75"])
        for text in named:
            make_plan(left, float(text), scope, whole=whole.shapes)
    assert "(8 experts" in str(refused.value) if scope == "layer" else "(16 experts" in str(refused.value)


# ----------------------------------------------------------------------------------------------- refusals


def refusal(scores: ExpertScores, ratio: float, scope: Scope, floor: int | None = None) -> str:
    with pytest.raises(InputError) as refused:
        make_plan(scores, ratio, scope, floor)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float, scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4]]), ratio, scope)
    assert str(ratio) in message and "between 0 and 1" in message


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_that_drops_nothing_is_refused(scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3, 4]]), 0.05, scope)
    assert "drops nothing" in message and "0.25" in message


@pytest.mark.parametrize("scope", SCOPES)
def test_a_ratio_that_drops_too_much_is_refused(scope: Scope) -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3, 4]], top_k=2), 0.75, scope)
    assert f"drops {3 if scope == 'layer' else 6}" in message and message.endswith("0.5.")
    assert "top_k=2" in message or scope == "global"


def test_a_layer_that_must_stay_whole_is_named() -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2]], top_k=[1, 2]), 0.5, "layer")
    assert "model.layers.1.mlp" in message and "no expert can be dropped" in message
    message = refusal(scores_of([[1, 2], [1, 2]], top_k=2), 0.5, "global")
    assert "no expert can be dropped" in message


def test_a_floor_above_the_experts_is_refused() -> None:
    message = refusal(scores_of([[1, 2, 3, 4], [1, 2, 3]]), 0.25, "global", floor=4)
    assert "--floor 4" in message and "model.layers.1.mlp" in message and "3 experts" in message


REAL = {
    "Mixtral 8x7B": (32, 8, 2, 1, 1),
    "OLMoE": (16, 64, 8, 1, 1),
    "Qwen3-30B-A3B": (48, 128, 8, 1, 1),
    "DeepSeek-V3": (58, 256, 8, 8, 4),
    "DeepSeek-V2-Lite": (26, 64, 6, 1, 1),
    "Kimi-K2": (60, 384, 8, 1, 1),
}
"""Layers, experts, top_k, groups, groups per token."""


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("model", REAL)
def test_the_ratios_named_are_possible(model: str, scope: Scope) -> None:
    """A refusal names ratios; each of them, as it stands there, makes a plan, and they reach to both ends."""
    layers, num_experts, top_k, groups, topk_group = REAL[model]
    generator = torch.Generator().manual_seed(0)
    scores = scores_of(torch.rand(layers, num_experts, generator=generator).tolist(), top_k, groups, topk_group)
    for ratio in (1e-9, 0.999999):
        named = re.findall(r"[\d.e-]*\d", refusal(scores, ratio, scope).partition("possible ratios: ")[2])
        assert 4 <= len(named) <= 20
        for text in named:
            kept(scores, float(text), scope)
        least = sum(len(ids) for ids in kept(scores, float(named[-1]), scope))
        assert least == layers * groups * scores.shapes[0].fewest_per_group
        most = sum(len(ids) for ids in kept(scores, float(named[0]), scope))
        assert most == layers * num_experts - groups * (layers if scope == "layer" else 1)
