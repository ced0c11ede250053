"""NAEE's search over sets: every set, or one expert after another; the errors are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape, find_moe_layers
from lightning_moe.moe.non_uniform import per_expert_tensors
from lightning_moe.moe.surgery import check_keep
from lightning_moe.search import naee
from lightning_moe.search.cached_outputs import CachedOutputs
from lightning_moe.search.naee import ChosenSet, choose_experts, count_sets, is_exact, remove_experts
from tests.helpers.families import tiny_batch, tiny_model

Sets = Sequence[tuple[int, ...]]

SHAPES = st.builds(
    lambda groups, size, top: LayerShape("block", 0, groups * size, top, groups, 1),
    st.integers(1, 2),
    st.integers(3, 4),
    st.integers(1, 2),
)


def random_errors(shape: LayerShape, seed: int) -> Callable[[Sets], Tensor]:
    """Those of a linear layer: the sum of the outputs of dropped experts."""
    generator = torch.Generator().manual_seed(seed)
    outputs_EH = torch.randn(shape.num_experts, 3, generator=generator, dtype=torch.float64)

    def errors(keeps: Sets) -> Tensor:
        dropped = [[one for one in range(shape.num_experts) if one not in keep] for keep in keeps]
        return torch.stack([outputs_EH[some].sum(0).norm() for some in dropped])

    return errors


def best_of_all(shape: LayerShape, drop: int, errors: Callable[[Sets], Tensor]) -> tuple[list[int], float]:
    """One set after another; of two alike the earlier stays."""
    best: tuple[list[int], float] = ([], float("inf"))
    for keep in combinations(range(shape.num_experts), shape.num_experts - drop):
        counts = {sum(one // shape.group_size == group for one in keep) for group in range(shape.num_groups)}
        if len(counts) == 1 and float(errors([keep])[0]) < best[1] - 1e-12:
            best = list(keep), float(errors([keep])[0])
    return best


@given(SHAPES, st.integers(0, 1000), st.data())
def test_the_best_of_all_sets(shape: LayerShape, seed: int, data: st.DataObject) -> None:
    drop = data.draw(st.integers(1, shape.group_size - 1)) * shape.num_groups
    errors = random_errors(shape, seed)
    found = choose_experts(shape, drop, errors)
    keep, error = best_of_all(shape, drop, errors)
    size = float(errors([()])[0])
    assert found == ChosenSet(keep, found.error, count_sets(shape, drop))
    assert found.error * size == pytest.approx(error)


@given(SHAPES, st.integers(0, 1000), st.data())
def test_removal_is_never_better_and_right_for_one(shape: LayerShape, seed: int, data: st.DataObject) -> None:
    """And keeps what the router needs, the same number in each group."""
    each = data.draw(st.integers(1, shape.group_size - 1))
    errors = random_errors(shape, seed)
    exact, removed = (how(shape, each * shape.num_groups, errors) for how in (choose_experts, remove_experts))
    assert removed.error >= exact.error - 1e-12
    counts = {sum(one // shape.group_size == group for one in removed.keep) for group in range(shape.num_groups)}
    assert counts == {shape.group_size - each} and removed.keep == sorted(set(removed.keep))
    if each * shape.num_groups == 1:
        assert removed.keep == exact.keep
    if len(removed.keep) >= shape.fewest:
        check_keep([shape], {shape.name: removed.keep})


@given(st.integers(0, 1000), st.permutations(range(6)), st.integers(1, 5))
def test_other_names_of_the_experts_name_the_choice(seed: int, order: list[int], drop: int) -> None:
    """Where no two sets are alike."""
    shape = LayerShape("block", 0, 6, 1)
    errors = random_errors(shape, seed)
    for search in (choose_experts, remove_experts):
        plain = search(shape, drop, errors).keep
        renamed = search(shape, drop, lambda keeps: errors([tuple(order[one] for one in keep) for keep in keeps])).keep
        assert sorted(order[one] for one in renamed) == plain


@pytest.mark.parametrize("search", [choose_experts, remove_experts])
def test_of_equal_sets_the_first_stays(search: Callable[..., ChosenSet]) -> None:
    """As they are where a router never picks some experts; rounding makes no difference."""
    shape = LayerShape("block", 0, 6, 1)

    def errors(keeps: Sets) -> Tensor:
        """Experts 2 and 4 are all that counts."""
        lost = [len({2, 4} - set(keep)) + 1e-9 * sum(keep) for keep in keeps]
        return torch.tensor(lost, dtype=torch.float64)

    assert search(shape, 3, errors).keep == [0, 2, 4]
    assert search(shape, 5, errors).keep == [2]


def test_dropping_nothing_keeps_all_and_a_layer_without_outputs_has_no_error() -> None:
    shape = LayerShape("block", 0, 4, 1)
    assert choose_experts(shape, 0, random_errors(shape, 0)).keep == [0, 1, 2, 3]
    assert choose_experts(shape, 2, lambda keeps: torch.zeros(len(keeps))) == ChosenSet([0, 1], 0.0, 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(bad: float) -> None:
    shape = LayerShape("model.layers.3.mlp", 3, 4, 1)
    for search in (choose_experts, remove_experts):
        with pytest.raises(InputError, match=r"layers\.3\.mlp.*not finite") as said:
            search(shape, 2, lambda keeps: torch.full((len(keeps),), bad))
        assert "\n" not in str(said.value)


def test_all_sets_are_tried_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LayerShape("block", 0, 16, 2)
    grouped = replace(whole, num_experts=64, num_groups=8, topk_group=4)
    assert (count_sets(whole, 8), count_sets(grouped, 8), count_sets(grouped, 32)) == (12870, 8**8, 70**8)
    assert is_exact(whole, 8) and not is_exact(grouped, 8)
    monkeypatch.setattr(naee, "EXACT_SETS", 70)
    for num_experts, search in ((8, "all"), (9, "one by one")):
        shape = LayerShape("block", 0, num_experts, 2)
        errors = random_errors(shape, 0)
        found = choose_experts(shape, 4, errors)
        assert (found.tried == count_sets(shape, 4)) == (search == "all")
        assert (found == remove_experts(shape, 4, errors)) == (search == "one by one")


def filled(model: PreTrainedModel) -> list[CachedOutputs]:
    """The outputs of all layers on a batch."""
    caches = [CachedOutputs(layer) for layer in find_moe_layers(model)]
    with ExitStack() as watched:
        for cache in caches:
            watched.enter_context(cache.attached())
            cache.next_batch(torch.ones_like(tiny_batch()))
        model(tiny_batch())
    return caches


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_removal_on_real_layers(family: str) -> None:
    """Never better than all sets, and never far from it; half-way its groups need not be alike."""
    for cache in filled(tiny_model(family)):
        exact, removed = (how(cache.layer.shape, 4, cache.errors) for how in (choose_experts, remove_experts))
        assert exact.error <= removed.error < 1.2 * exact.error
        check_keep([cache.layer.shape], {cache.layer.name: removed.keep})


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_permuting_experts_permutes_the_choice(family: str) -> None:
    order = [5, 7, 4, 6, 2, 0, 3, 1]  # whole groups of four change places, as DeepSeek-V3 wants
    plain, renamed = tiny_model(family), tiny_model(family)
    for layer in find_moe_layers(renamed):
        for owner, name, tensor, dimension in per_expert_tensors(layer.parts):
            assert dimension == 0, f"{owner}: {name}"
            tensor.copy_(tensor[order].clone())
    chosen = [choose_in(model) for model in (plain, renamed)]
    assert [sorted(order[one] for one in keep) for keep in chosen[1]] == chosen[0]


def choose_in(model: PreTrainedModel) -> list[list[int]]:
    return [choose_experts(cache.layer.shape, 4, cache.errors).keep for cache in filled(model)]
