"""The skew of a load: its figures by hand and by slow references, and counts that are those of the router's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing, mask_plan, record_routing
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.usage import FIGURES, RouterCounts, load_figures, mean_load
from tests.helpers.families import FAMILIES, TOP_K, tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan

LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=12)
SOME_LOADS = LOADS.filter(any)


def slow_cv(count_E: Sequence[float]) -> float:
    mean = sum(count_E) / len(count_E)
    return math.sqrt(sum((count - mean) ** 2 for count in count_E) / len(count_E)) / mean


def slow_gini(count_E: Sequence[float]) -> float:
    """Half the mean difference of all pairs, over the mean."""
    mean = sum(count_E) / len(count_E)
    differences = [abs(one - other) for one in count_E for other in count_E]
    return sum(differences) / len(differences) / (2 * mean)


def slow_entropy(count_E: Sequence[float]) -> float:
    if len(count_E) == 1:
        return 1.0
    shares = [count / sum(count_E) for count in count_E]
    return sum(-share * math.log(share) for share in shares if share) / math.log(len(count_E))


def test_the_figures_by_hand() -> None:
    """Loads 6, 2, 0, 0 of mean 2: deviations 4, 0, -2, -2, so cv = sqrt(24 / 4) / 2 = sqrt(6) / 2; the largest is 3
    means; shares 3/4 and 1/4, so the entropy is (3/4 log(4/3) + 1/4 log 4) / log 4; the 16 pairs differ by
    2 * (4 + 6 + 6 + 2 + 2 + 0) = 40 in all, so Gini = 40 / 16 / (2 * 2) = 5/8; two are dead."""
    found = load_figures([2, 0, 6, 0])
    assert tuple(found) == FIGURES
    assert found["cv"] == pytest.approx(math.sqrt(6) / 2)
    assert found["max_over_mean"] == pytest.approx(3)
    assert found["entropy"] == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4))
    assert found["gini"] == pytest.approx(5 / 8)
    assert found["dead"] == 2


@given(SOME_LOADS)
def test_the_figures_equal_slow_references(count_E: list[int]) -> None:
    found = load_figures(count_E)
    mean = sum(count_E) / len(count_E)
    expected = {
        "cv": slow_cv(count_E),
        "max_over_mean": max(count_E) / mean,
        "entropy": slow_entropy(count_E),
        "gini": slow_gini(count_E),
        "dead": sum(count == 0 for count in count_E),
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(SOME_LOADS, st.randoms())
def test_the_order_of_experts_does_not_matter(count_E: list[int], random: st.random.Random) -> None:  # type: ignore
    moved = list(count_E)
    random.shuffle(moved)
    assert load_figures(moved) == pytest.approx(load_figures(count_E), rel=1e-12, abs=1e-12)


@given(SOME_LOADS, st.floats(1e-3, 1e9))
def test_only_shares_matter(count_E: list[int], factor: float) -> None:
    scaled = load_figures([factor * count for count in count_E])
    assert scaled == pytest.approx(load_figures(count_E), rel=1e-9, abs=1e-9)


@given(st.integers(1, 300), st.integers(1, 10**9))
def test_an_even_load(experts: int, count: int) -> None:
    even = {"cv": 0.0, "max_over_mean": 1.0, "entropy": 1.0, "gini": 0.0, "dead": 0.0}
    assert load_figures([count] * experts) == pytest.approx(even, abs=1e-9)


@given(SOME_LOADS)
def test_all_on_one_expert_is_the_worst(count_E: list[int]) -> None:
    """cv sqrt(E - 1), the largest E means, no entropy, Gini 1 - 1/E, and all but one dead; no load is beyond it."""
    experts = len(count_E)
    worst = load_figures([sum(count_E)] + [0] * (experts - 1))
    assert worst == pytest.approx(
        {
            "cv": math.sqrt(experts - 1),
            "max_over_mean": experts,
            "entropy": 0.0 if experts > 1 else 1.0,
            "gini": 1 - 1 / experts,
            "dead": experts - 1,
        },
        abs=1e-9,
    )
    found = load_figures(count_E)
    for name in ("cv", "max_over_mean", "gini", "dead"):
        assert -1e-9 <= found[name] <= worst[name] + 1e-9, name
    assert worst["entropy"] - 1e-9 <= found["entropy"] <= 1 + 1e-9


@pytest.mark.parametrize("experts", [2, 5, 64])
def test_no_token_at_all(experts: int) -> None:
    """As uneven as can be, and every expert dead."""
    assert load_figures([0] * experts) == pytest.approx(
        load_figures([1] + [0] * (experts - 1)) | {"dead": experts}, abs=1e-12
    )


def test_no_figure_is_a_negative_zero() -> None:
    """Which a table would show as ``-0``."""
    for count_E in ([5], [5, 0, 0], [1, 1], [0, 0], [0]):
        assert all(math.copysign(1, value) > 0 for value in load_figures(count_E).values()), count_E


@given(st.lists(LOADS, min_size=1, max_size=5))
def test_the_mean_load(loads: list[list[int]]) -> None:
    """Layers of any sizes weigh the same; dead experts are counted over all of them."""
    layers = [load_figures(count_E) for count_E in loads]
    found = mean_load({f"layers.{turn}": count_E for turn, count_E in enumerate(loads)})
    assert tuple(found) == FIGURES
    for name in FIGURES:
        total = math.fsum(layer[name] for layer in layers)
        assert found[name] == pytest.approx(total if name == "dead" else total / len(layers), rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------- counts


def slow_counts(routings: dict[str, list[Routing]], masks: list[Tensor | None], sizes: dict[str, int]) -> dict:  # type: ignore
    counts = {name: [0] * size for name, size in sizes.items()}
    for name, batches in routings.items():
        for routing, mask in zip(batches, masks, strict=True):
            ids = routing.expert_ids_TK.tolist()
            real = [1] * len(ids) if mask is None else mask.flatten().tolist()
            for token, chosen in enumerate(ids):
                for expert in chosen:
                    counts[name][expert] += real[token]
    return counts


def as_it_is(count_E: Tensor) -> Tensor:
    return count_E


@torch.no_grad()
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_routers_outputs(family: str, pruned: bool) -> None:
    """Over batches of any length, with and without padding, for layers of any size."""
    model = tiny_model(family)
    if pruned:
        keep_experts(model, non_uniform_plan(model))
    layers = find_moe_layers(model)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    masks: list[Tensor | None] = [None, mask, mask.bool(), torch.zeros_like(mask)]
    routings: dict[str, list[Routing]] = {layer.name: [] for layer in layers}
    counts = RouterCounts(model)
    with record_routing(layers, lambda layer, one: routings[layer.name].append(one)), counts.attached():
        for turn, batch_mask in enumerate(masks):
            counts.next_batch(batch_mask)
            model(tiny_batch(length=10 if turn else 7, seed=turn))
    taken = counts.take(as_it_is)
    assert list(taken) == [layer.name for layer in layers]
    assert taken == slow_counts(routings, masks, {layer.name: layer.num_experts for layer in layers})
    assert all(sum(count_E) == TOP_K * (14 + 16 + 16) for count_E in taken.values())
    assert not any(layer.router._forward_hooks for layer in layers)


@torch.no_grad()
def test_taking_starts_anew() -> None:
    model, counts_of = tiny_model("mixtral"), []
    counts = RouterCounts(model)
    with counts.attached():
        for _ in range(2):
            model(tiny_batch())
            counts_of.append(counts.take(as_it_is))
    assert counts_of[0] == counts_of[1]
    nothing = counts.take(as_it_is)
    assert nothing == {layer.name: [0.0] * 8 for layer in find_moe_layers(model)}


@torch.no_grad()
def test_pauses_are_not_counted() -> None:
    model = tiny_model("mixtral")
    counts = RouterCounts(model)
    with counts.attached():
        model(tiny_batch())
        counts.paused = True
        model(tiny_batch(seed=1))
        counts.paused = False
    alone = RouterCounts(model)
    with alone.attached():
        model(tiny_batch())
    assert counts.take(as_it_is) == alone.take(as_it_is)


@torch.no_grad()
def test_a_layer_that_loses_experts_starts_anew() -> None:
    """Old ids mean other experts."""
    model = tiny_model("mixtral")
    keep = non_uniform_plan(model)
    counts = RouterCounts(model)
    with counts.attached():
        model(tiny_batch())
        keep_experts(model, keep)
        model(tiny_batch(seed=1))
        taken = counts.take(as_it_is)
    alone = RouterCounts(model)
    with alone.attached():
        model(tiny_batch(seed=1))
    assert taken == alone.take(as_it_is)
    assert [len(count_E) for count_E in taken.values()] == [len(ids) for ids in keep.values()]


@torch.no_grad()
def test_reducing_runs_over_every_layer_in_the_same_order() -> None:
    """Also where a rank saw nothing: the collectives of all ranks must meet."""
    model, sizes = tiny_model("deepseek_v3"), []
    keep_experts(model, non_uniform_plan(model))
    counts = RouterCounts(model)

    def twice(count_E: Tensor) -> Tensor:
        assert count_E.dtype == torch.float64
        sizes.append(count_E.shape[0])
        return 2 * count_E

    counts.take(twice)
    with counts.attached():
        model(tiny_batch())
    once = dict(counts.counts)
    taken = counts.take(twice)
    assert sizes == 2 * [layer.num_experts for layer in find_moe_layers(model)]
    assert taken == {name: (2 * count_E).tolist() for name, count_E in once.items()}


@torch.no_grad()
@pytest.mark.parametrize("taken_between", [True, False])
def test_cut_or_masked_counts_are_the_same(taken_between: bool) -> None:
    """Those of before are of the experts of before; without a ``take`` between them all layers start anew."""
    found = []
    for masked in (False, True):
        model = tiny_model("mixtral")
        spared, cut = [layer.name for layer in find_moe_layers(model)]
        keep = {spared: list(range(8)), cut: [0, 2, 3, 7]}
        counts = RouterCounts(model)
        with ExitStack() as stack:
            stack.enter_context(counts.attached())
            counts.next_batch(None)
            model(tiny_batch(length=10))
            assert not counts.stale
            if masked:
                stack.enter_context(mask_plan(find_moe_layers(model), keep))
            else:
                keep_experts(model, keep)
            assert counts.stale
            before = counts.take(as_it_is) if taken_between else None
            assert counts.stale != taken_between
            counts.next_batch(None)
            model(tiny_batch(length=7))
            found.append((before, counts.take(as_it_is)))
    assert found[0] == found[1]
    before, after = found[0]
    assert before is None or [(len(count_E), sum(count_E)) for count_E in before.values()] == [(8, 20 * TOP_K)] * 2
    assert [(len(count_E), sum(count_E)) for count_E in after.values()] == [(8, 14 * TOP_K), (4, 14 * TOP_K)]
