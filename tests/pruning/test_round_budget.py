"""Plans round by round: they end with the counts of one cut, and with its experts if scores stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.surgery import check_keep
from lightning_moe.pruning.budget import Scope, blank_scores, make_plan
from lightning_moe.pruning.plan import compose, cut_shapes
from lightning_moe.pruning.scores import ExpertScores
from tests.helpers.layer_scores import SCOPES, scores_of

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
