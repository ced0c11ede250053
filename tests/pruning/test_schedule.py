"""A schedule says how much is gone after each round; what no scores could carry out is refused before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.plan import cut_shapes
from lightning_moe.pruning.schedule import RoundSchedule, check_rounds, make_schedule
from lightning_moe.pruning.scores import ExpertScores

SCOPES: tuple[Scope, Scope] = ("layer", "global")


def shapes_of(*num_experts: int, top_k: int = 2) -> list[LayerShape]:
    return [LayerShape(f"model.layers.{i}.mlp", i, count, top_k) for i, count in enumerate(num_experts)]


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as refused:
        make_schedule(*args, **kwargs)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300
    return message


# ----------------------------------------------------------------------------------------------- schedules


def test_schedules_by_hand() -> None:
    """Half a cosine: 1 - cos of 60, 120 and 180 degrees, halved, is 1/4, 3/4 and 1."""
    assert make_schedule(0.6, 3) == RoundSchedule((0.2, 0.4, 0.6), (0, 0, 0))
    assert make_schedule(0.6, 3, "cosine").ratios == (0.15, 0.45, 0.6)
    assert make_schedule(0.6, [0.1, 0.5, 0.6], first_tokens=10) == RoundSchedule((0.1, 0.5, 0.6), (10, 20, 40))
    assert make_schedule(0.6, 1, "cosine", 7) == RoundSchedule((0.6,), (7,))


@given(
    ratio=st.floats(0.01, 0.99), rounds=st.integers(1, 30), spacing=st.sampled_from(["equal", "cosine"]), data=st.data()
)
def test_rounds_climb_to_the_ratio(ratio: float, rounds: int, spacing: Any, data: st.DataObject) -> None:
    """By steps that look the same from both ends; given as a list, the same rounds."""
    schedule = make_schedule(ratio, rounds, spacing, data.draw(st.integers(0, 1000)))
    assert len(schedule) == len(schedule.ratios) == len(schedule.tokens) == rounds
    assert schedule.ratios[-1] == ratio  # to the last digit: it is looked up
    steps = [after - before for before, after in pairwise((0.0, *schedule.ratios))]
    assert all(step > 0 for step in steps)
    assert steps == pytest.approx(steps[::-1], abs=1e-9)
    if spacing == "equal":
        assert steps == pytest.approx([ratio / rounds] * rounds, abs=1e-9)
    elif rounds > 2:
        assert steps[0] < ratio / rounds < steps[rounds // 2]
    assert make_schedule(ratio, schedule.ratios, spacing, schedule.tokens[0]) == schedule


@given(first=st.integers(0, 10**6), growth=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]), rounds=st.integers(1, 10))
def test_tokens_grow_from_round_to_round(first: int, growth: float, rounds: int) -> None:
    assert make_schedule(0.5, rounds, first_tokens=first).tokens == tuple(first * 2**turn for turn in range(rounds))
    tokens = make_schedule(0.5, rounds, first_tokens=first, growth=growth).tokens
    assert tokens[0] == first
    assert all(type(one) is int and abs(one - first * growth**turn) <= 0.5 for turn, one in enumerate(tokens))


def test_up_to_ends_with_that_round() -> None:
    schedule = make_schedule(0.6, [0.1, 0.3, 0.6], first_tokens=1)
    assert schedule.up_to(0.3) == RoundSchedule((0.1, 0.3), (1, 2))
    assert schedule.up_to(0.6) == schedule


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "no round": ((0.5, 0), {}, ["--rounds 0", "at least 1"]),
    "fewer than none": ((0.5, -2), {}, ["--rounds -2"]),
    "an empty list": ((0.5, []), {}, ["--rounds []", "ascending"]),
    "descending": ((0.5, [0.4, 0.3, 0.5]), {}, ["[0.4, 0.3, 0.5]", "ascending"]),
    "twice the same": ((0.5, [0.3, 0.3, 0.5]), {}, ["ascending"]),
    "beyond the ratio": ((0.5, [0.25, 0.75]), {}, ["asked for, 0.5"]),
    "not as far": ((0.5, [0.25, 0.4]), {}, ["asked for, 0.5"]),
    "nothing first": ((0.5, [0.0, 0.5]), {}, ["[0.0, 0.5]"]),
    "less than nothing": ((0.5, [-0.1, 0.5]), {}, ["[-0.1, 0.5]"]),
    "not a number": ((0.5, [math.nan, 0.5]), {}, ["nan"]),
    "tokens": ((0.5, 2), {"first_tokens": -1}, ["--finetune_tokens -1", "0 or more"]),
    "growth 0": ((0.5, 2), {"growth": 0.0}, ["--finetune_growth 0.0", "above 0"]),
    "growth below 0": ((0.5, 2), {"growth": -2.0}, ["--finetune_growth -2.0"]),
    "growth not a number": ((0.5, 2), {"growth": math.nan}, ["--finetune_growth nan"]),
    "growth without end": ((0.5, 2), {"growth": math.inf, "first_tokens": 8}, ["--finetune_growth inf"]),
    "growth beyond numbers": ((0.5, 3), {"growth": 1e200, "first_tokens": 8}, ["--finetune_growth 1e+200"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_schedule_is_refused_in_one_line(name: str) -> None:
    args, kwargs, words = REFUSED[name]
    message = refusal(*args, **kwargs)
    assert all(word in message for word in words), message


def test_very_many_rounds_are_refused_as_too_many() -> None:
    """2 to the 1024th tokens are more than a float holds; that must not be what is said."""
    with pytest.raises(InputError, match="round"):
        check_rounds(shapes_of(8, 8), make_schedule(0.5, 2000), "layer")


# -------------------------------------------------------------------------------------------- check_rounds


def carried_out(
    shapes: Sequence[LayerShape], schedule: RoundSchedule, scope: Scope, floor: int | None, generator: torch.Generator
) -> bool:
    """Whether all rounds succeed on scores drawn anew in each."""
    now = list(shapes)
    for ratio in schedule.ratios:
        values = {s.name: torch.rand(s.num_experts, generator=generator, dtype=torch.float64) for s in now}
        scores = ExpertScores("", "", "random", now, values)
        try:
            now = cut_shapes(now, make_plan(scores, ratio, scope, floor, whole=shapes).keep)
        except InputError:
            return False
    return True


@pytest.mark.parametrize("scope", SCOPES)
@given(
    sizes=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    groups=st.sampled_from([1, 1, 2]),
    top_k=st.integers(1, 3),
    floor=st.none() | st.integers(1, 3),
    ratios=st.sets(st.integers(5, 80), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_refused_is_what_would_fail_whatever_the_scores(
    scope: Scope, sizes: list[int], groups: int, top_k: int, floor: int | None, ratios: set[int], seed: int
) -> None:
    shapes = [LayerShape(f"layer.{i}", i, size * groups, top_k, groups, groups) for i, size in enumerate(sizes)]
    schedule = make_schedule(max(ratios) / 100, [percent / 100 for percent in sorted(ratios)])
    try:
        check_rounds(shapes, schedule, scope, floor)
        possible = True
    except InputError as refused:
        assert "\n" not in str(refused) and str(refused).startswith("round ")
        possible = False
    assert possible == carried_out(shapes, schedule, scope, floor, torch.Generator().manual_seed(seed))


def refused_rounds(shapes: Sequence[LayerShape], ratio: float, rounds: Any, scope: Scope, **more: Any) -> str:
    with pytest.raises(InputError) as refused:
        check_rounds(shapes, make_schedule(ratio, rounds), scope, **more)
    return str(refused.value)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_refused_round_is_named(scope: Scope) -> None:
    """Of 4 experts with top-2, 2 can go; a quarter of 4 is one, a third is one too (1.33)."""
    shapes = shapes_of(4, 4)
    check_rounds(shapes, make_schedule(0.5, 2), scope)
    assert refused_rounds(shapes, 0.75, [0.25, 0.5, 0.75], scope).startswith("round 3 of 3: --ratio 0.75: ")
    assert refused_rounds(shapes, 0.5, [0.05, 0.5], scope).startswith("round 1 of 2: --ratio 0.05 drops nothing in ")
    if scope == "layer":
        assert refused_rounds(shapes, 0.5, [0.25, 0.33, 0.5], scope).startswith(
            "round 2 of 3: --ratio 0.33 drops nothing more than the rounds before"
        )
    assert "floor" in refused_rounds(shapes, 0.5, 2, scope, floor=4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_a_ratio_that_is_none_is_refused(ratio: float, scope: Scope) -> None:
    assert f"--ratio {ratio}" in refused_rounds(shapes_of(8), ratio, 2, scope)
