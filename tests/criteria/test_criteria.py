"""Every criterion equals its slow reference, and obeys the laws of a score: higher means keep."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.cli.plugins import plugins
from lightning_moe.criteria import criteria, get_criterion
from lightning_moe.criteria.registry import Direction, drop_order
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.scores import score_experts, write_scores
from lightning_moe.stats.layer_stats import GRADIENTS, LayerStats
from lightning_moe.stats.store import ModelStats
from tests.helpers.random_layers import ALL, WIDTH, assert_scores, permuted, random_layer, stats_of
from tests.helpers.reference.criteria import MEASURES, PAIR_MEASURES, drop_turns, euf
from tests.helpers.reference.raw_layers import SeenToken, Visit

PAPER_DROPS: dict[str, Direction] = {
    "ews": "max",
    "rwn": "max",
    "wsr": "max",
    "ewn": "min",
    "euf": "min",
    "ecc": "max",
    "evc": "min",
    "ets": "max",
    "eas": "max",
    "eae": "min",
    "eao": "min",
    "ean": "min",
    "egs": "max",
    "ege": "min",
    "ego": "min",
    "egn": "min",
    "reap": "min",
    "reap-sum": "min",
    "man": "min",
    "msan": "min",
    "seer": "min",
    "trimming": "min",
    "random": "min",
}
"""Which end goes first: the papers' tables, and our choice where they are silent (EWN, EAO, EGS, EGO, EGN)."""

EVERY = [criterion.name for criterion in criteria()]
DIRECTIONS: tuple[Direction, Direction] = ("min", "max")

every_criterion = pytest.mark.parametrize("name", EVERY)
every_measure = pytest.mark.parametrize("name", MEASURES)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


@cache
def random_stats(seed: int) -> LayerStats:
    """Made once for all criteria; whoever changes them in place fails elsewhere."""
    return stats_of(random_layer(seed))


def without_ties(stats: LayerStats, seed: int) -> LayerStats:
    """The same, but each of the 15 pairs of 6 experts shares another number of tokens and of token ids."""
    generator = torch.Generator().manual_seed(seed)
    together_EE = torch.zeros(6, 6, dtype=torch.float64)
    seen = []
    for shared, (p, q) in zip(torch.randperm(15, generator=generator).tolist(), combinations(range(6), 2), strict=True):
        together_EE[p, q] = together_EE[q, p] = shared
        column_E = torch.zeros(6, dtype=torch.bool)
        column_E[[p, q]] = True
        seen += [column_E] * shared
    count_E = torch.randperm(6, generator=generator).double() + 1
    return replace(stats, together_EE=together_EE, seen_EV=torch.stack(seen, dim=1), count_E=count_E)


# ----------------------------------------------------------------------------------------- the reference


def test_every_criterion_has_a_reference() -> None:
    assert {*MEASURES, *PAIR_MEASURES, "random"} == set(PAPER_DROPS)
    assert set(EVERY) == set(PAPER_DROPS) or plugins()


@every_measure
@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_the_reference(name: str, seed: int) -> None:
    raw = random_layer(seed)
    expected = MEASURES[name](raw)
    assert max(expected) - min(expected) > 1e-3  # otherwise being equal would say little
    stats, criterion = stats_of(raw), get_criterion(name)
    assert_scores(criterion.scores(stats, "min"), expected)
    assert_scores(criterion.scores(stats, "max"), [-score for score in expected])
    assert criterion.comparable


@pytest.mark.parametrize("name", PAIR_MEASURES)
@every_direction
@pytest.mark.parametrize("seed", range(3))
def test_pair_criteria_equal_the_reference(name: str, direction: Direction, seed: int) -> None:
    raw = random_layer(seed)
    turns = drop_turns(PAIR_MEASURES[name](raw), euf(raw), direction)
    criterion = get_criterion(name)
    assert_scores(criterion.scores(stats_of(raw), direction), [turn / raw.num_experts for turn in turns])
    assert not criterion.comparable


# ------------------------------------------------------------------------------------------------ the laws


@every_criterion
@every_direction
@settings(max_examples=15)
@given(order=st.permutations(range(6)), seed=st.integers(0, 20))
def test_permuting_experts_permutes_scores(name: str, direction: Direction, order: list[int], seed: int) -> None:
    if name == "random":
        return  # knows experts by their number only
    stats = random_stats(seed)
    if name in PAIR_MEASURES:  # ties are decided by number, so every pair and every count is another one
        stats = without_ties(stats, seed)
    criterion = get_criterion(name)
    expected = criterion.scores(stats, direction)[order]
    torch.testing.assert_close(criterion.scores(permuted(stats, order), direction), expected, atol=1e-12, rtol=1e-12)


@every_measure
def test_max_is_the_reverse_of_min(name: str) -> None:
    stats, criterion = stats_of(random_layer(5)), get_criterion(name)
    least, most = (criterion.scores(stats, direction).tolist() for direction in DIRECTIONS)
    for p, q in combinations(range(6), 2):
        assert (least[p] < least[q]) == (most[p] > most[q]) and (least[p] > least[q]) == (most[p] < most[q])


@pytest.mark.parametrize("name", PAPER_DROPS)
def test_the_default_is_what_the_paper_drops(name: str) -> None:
    stats, criterion = stats_of(random_layer(6)), get_criterion(name)
    assert criterion.direction == PAPER_DROPS[name]
    assert torch.equal(criterion.scores(stats), criterion.scores(stats, PAPER_DROPS[name]))


@every_measure
@pytest.mark.parametrize("seed", range(3))
def test_the_expert_at_the_papers_end_goes_first(name: str, seed: int) -> None:
    raw = random_layer(seed)
    measured = MEASURES[name](raw)
    end = (min if PAPER_DROPS[name] == "min" else max)(measured)
    assert get_criterion(name).scores(stats_of(raw)).argmin() == measured.index(end)


@pytest.mark.parametrize("name", ["euf", "evc", "eae", "ean", "reap", "reap-sum", "man", "msan", "seer", "trimming"])
def test_an_expert_that_does_less_of_everything_goes_first(name: str) -> None:
    """Expert 2 keeps two of its tokens, a tenth of its weight and a hundredth of its output."""
    raw = random_layer(7)
    left = 2  # visits that expert 2 keeps; the others go to an expert of their own token's choice
    tokens = []
    for token in raw.tokens:
        visits = []
        for visit in token.visits:
            if visit.expert == 2 and left:
                visit = Visit(2, visit.weight / 10, [x / 100 for x in visit.output])
                left -= 1
            elif visit.expert == 2:
                visit = replace(visit, expert=next(e for e in (5, 0) if e not in raw.chosen(token)))
            visits.append(visit)
        probabilities = [p / 20 if expert == 2 else p for expert, p in enumerate(token.probabilities)]
        tokens.append(SeenToken(token.token_id, probabilities, visits))
    weak = replace(raw, tokens=tokens)
    assert MEASURES[name](weak)[2] == min(MEASURES[name](weak))
    assert get_criterion(name).scores(stats_of(weak)).argmin() == 2


@every_criterion
@every_direction
def test_scores_are_numbers_whatever_the_use(name: str, direction: Direction) -> None:
    """Expert 5 got no token, expert 4 one; then no expert any, as before calibration."""
    often = random_layer(8, num_experts=4)
    tokens = [replace(token, probabilities=[*token.probabilities, 0.0, 0.0]) for token in often.tokens]
    once = SeenToken(3, [0.4, 0, 0, 0, 0.5, 0.1], [Visit(4, 0.6, [2.0] * WIDTH), Visit(0, 0.4, [1.0] * WIDTH)])
    zeros = [torch.zeros(5, WIDTH)] * 2
    used = random_layer(8)
    rare = stats_of(replace(used, tokens=[*tokens, once], gradients=[*used.gradients[:5], zeros]))
    assert rare.count_E.tolist()[4:] == [1, 0]
    nothing = replace(rare, **{n: torch.zeros_like(getattr(rare, n)) for n in ALL})
    for stats in (rare, nothing):
        scores = get_criterion(name).scores(stats, direction)
        assert scores.shape == (6,) and scores.dtype == torch.float64
        assert bool(scores.isfinite().all())
    if name in {"euf", "evc", "ean", "reap", "reap-sum", "man", "msan", "seer", "ege", "ego", "egn"}:
        assert get_criterion(name).scores(rare).argmin() == 5


@every_criterion
def test_scores_are_values(name: str) -> None:
    """Whoever changes them in place does not change the statistics."""
    stats = stats_of(random_layer(9))
    before = {field: getattr(stats, field).clone() for field in ALL}
    for direction in DIRECTIONS:
        get_criterion(name).scores(stats, direction).zero_()
    for field, value in before.items():
        assert torch.equal(getattr(stats, field), value), field


@every_criterion
def test_only_criteria_on_gradients_need_them(name: str) -> None:
    stats = stats_of(random_layer(9))
    bare, criterion = replace(stats, **dict.fromkeys(GRADIENTS)), get_criterion(name)
    assert stats.has_gradients and not bare.has_gradients
    if not criterion.gradients:
        assert torch.equal(criterion.scores(bare), criterion.scores(stats))
        return
    with pytest.raises(InputError, match=rf"model\.layers\.0\.mlp.*{name} needs gradients.*--gradients true"):
        criterion.scores(bare)


def test_damaged_statistics_are_refused() -> None:
    stats = stats_of(random_layer(9))
    gated_norm_E = stats.gated_norm_E.clone()
    gated_norm_E[1] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp.*reap.*not finite"):
        get_criterion("reap").scores(replace(stats, gated_norm_E=gated_norm_E))


# -------------------------------------------------------------------------------------------------- pairs


@every_direction
@settings(max_examples=60)
@given(data=st.data(), num_experts=st.integers(1, 7))
def test_the_drop_order_is_the_loop_of_the_paper(direction: Direction, data: st.DataObject, num_experts: int) -> None:
    """Small whole numbers, so that pairs and counts tie."""
    draw = st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)
    upper = torch.tensor([data.draw(draw) for _ in range(num_experts)], dtype=torch.float64).triu(1)
    counts = data.draw(draw)
    pairs = upper + upper.T + torch.diag(torch.full((num_experts,), 9.0, dtype=torch.float64))
    found = drop_order(pairs, torch.tensor(counts, dtype=torch.float64), direction)
    assert found.tolist() == drop_turns(pairs.tolist(), counts, direction)
    assert sorted(found.tolist()) == list(range(num_experts))


def test_of_the_extreme_pair_the_less_used_goes() -> None:
    """Experts 0 and 1 share most, 1 is used less: 1 goes. Then 0 and 2 share most, 2 is used less: 2 goes.
    Then 0 and 3 are left: 0 is used less and goes, 3 stays."""
    pairs = torch.tensor([[0, 9, 5, 1], [9, 0, 7, 2], [5, 7, 0, 3], [1, 2, 3, 0]], dtype=torch.float64)
    counts = torch.tensor([20.0, 10.0, 15.0, 30.0], dtype=torch.float64)
    assert drop_order(pairs, counts, "max").tolist() == [2, 0, 1, 3]
    # The least shared pair is 0 and 3: 0 goes. Then 1 and 3: 1 goes. Then 2 and 3: 2 goes.
    assert drop_order(pairs, counts, "min").tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------- random


def test_random_is_reproducible_and_differs_between_layers() -> None:
    layers = [replace(stats_of(random_layer(1)), shape=LayerShape(f"l.{i}", i, 6, 2)) for i in range(3)]
    scores = get_criterion("random").scores
    for layer in layers:
        assert torch.equal(scores(layer, None, 7), scores(layer, None, 7))
        assert not torch.equal(scores(layer, None, 7), scores(layer, None, 8))
    assert not torch.equal(scores(layers[0]), scores(layers[1]))
    assert not torch.equal(scores(layers[1]), scores(layers[2]))


def test_random_knows_nothing_of_the_statistics() -> None:
    one, other = stats_of(random_layer(1)), stats_of(random_layer(2))
    assert torch.equal(get_criterion("random").scores(one), get_criterion("random").scores(other))


# ------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize(
    ("wrong", "near"), [("reep", "reap"), ("REAP", "reap"), ("reap_sum", "reap-sum"), ("randon", "random")]
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(InputError) as refusal:
        get_criterion(wrong)
    message = str(refusal.value)
    assert wrong in message and f"Did you mean '{near}'?" in message and "\n" not in message
    assert all(name in message for name in EVERY)


def test_a_name_like_no_other_is_refused_with_all() -> None:
    with pytest.raises(InputError) as refusal:
        get_criterion("zzzzzz")
    assert "Did you mean" not in str(refusal.value) and ", ".join(sorted(EVERY)) in str(refusal.value)


@every_criterion
def test_every_criterion_says_what_it_is(name: str) -> None:
    assert len(get_criterion(name).summary) > 20


# ------------------------------------------------------------------------------------------ of whole models


def test_the_scores_of_a_model_are_those_of_its_layers(tmp_path: Path) -> None:
    layers = [stats_of(random_layer(1), 1), stats_of(random_layer(2, num_experts=4), 3)]
    stats = ModelStats("tiny@01", "data@23", layers)
    for name in EVERY:
        for direction in (None, *DIRECTIONS):
            scores = score_experts(stats, name, direction, seed=5)
            assert (scores.model_id, scores.data_fingerprint, scores.method) == ("tiny@01", "data@23", name)
            assert list(scores.shapes) == [layer.shape for layer in layers]
            assert scores.settings["direction"] == (direction or PAPER_DROPS[name])
            for layer in layers:
                expected = get_criterion(name).scores(layer, direction, 5)
                assert torch.equal(scores.scores[layer.shape.name], expected)
    write_scores(tmp_path / "scores.json", [score_experts(stats, name) for name in EVERY])
    assert all(f'"{name}"' in (tmp_path / "scores.json").read_text() for name in EVERY)
