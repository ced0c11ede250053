"""The laws of surgery and masking: a pruned model is the masked one, and a faulty plan changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, HIDDEN, NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.plans import Keep, compose, non_uniform_plan, uniform_plan
from tests.moe.pruned_models import (
    COUNT_NAMES,
    assert_identical,
    assert_one_line,
    every_family,
    every_plan,
    logits_of,
    masked,
    pruned,
    snapshot,
    stock_load,
)


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    config.pop("allow_global_per_layer_attribute_access", None)  # says nothing where layers agree
    return config


@every_family
def test_pruning_nothing_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    expected, weights, config = logits_of(model), snapshot(model), model.config.to_dict()
    for keep in ({}, {layer.name: range(NUM_EXPERTS) for layer in find_moe_layers(model)}):
        keep_experts(model, keep)
        assert torch.equal(logits_of(model), expected)
        assert_identical(snapshot(model), weights)
        assert model.config.to_dict() == config


@every_family
@every_plan
def test_a_pruned_model_equals_the_masked_one(family: str, plan: Callable[[PreTrainedModel], Keep]) -> None:
    model = tiny_model(family)
    keep = plan(model)
    expected, weights = logits_of(model), snapshot(model)
    with masked(model, keep):
        without = logits_of(model)
    assert (without - expected).abs().max() > 1e-3  # the plan matters
    assert_identical(snapshot(model), weights)
    assert torch.equal(logits_of(model), expected)
    smaller = pruned(model, keep)
    torch.testing.assert_close(logits_of(smaller), without, atol=1e-5, rtol=1e-5)
    assert [layer.num_experts for layer in find_moe_layers(smaller)] == [len(ids) for ids in keep.values()]
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@every_family
@pytest.mark.parametrize("num_experts", [16, HIDDEN])
def test_a_count_that_equals_a_width_confuses_nothing(family: str, num_experts: int, tmp_path: Path) -> None:
    """16 is also the width of many experts, 32 that of the model."""
    name = next(name for name in COUNT_NAMES if name in FAMILIES[family])
    model = tiny_model(family, **{name: num_experts})
    layers = find_moe_layers(model)
    half = num_experts // 2
    keep = {layer.name: [*range(1, half), *range(half + turn, num_experts)] for turn, layer in enumerate(layers)}
    if family == "deepseek_v3":
        keep = {name: [*range(turn, half), *range(half + turn, num_experts)] for turn, name in enumerate(keep)}
    with masked(model, keep):
        expected = logits_of(model)
    smaller = pruned(model, keep)
    torch.testing.assert_close(logits_of(smaller), expected, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "full")
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "out")
    loaded = stock_load(tmp_path / "out")
    assert_identical(loaded.state_dict(), smaller.state_dict())


@every_family
def test_a_mask_goes_when_the_forward_fails(family: str) -> None:
    model = tiny_model(family)
    expected, weights = logits_of(model), snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), masked(model, uniform_plan(model)):
        raise RuntimeError("stop")
    assert_identical(snapshot(model), weights)
    assert torch.equal(logits_of(model), expected)


@every_family
def test_a_pruned_model_generates_what_the_masked_one_does(family: str) -> None:
    model, prompt = tiny_model(family), tiny_batch(length=6)
    keep = non_uniform_plan(model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with masked(model, keep):
        expected = model.generate(prompt, **settings)
    assert torch.equal(pruned(model, keep).generate(prompt, **settings), expected)


@every_family
def test_pruning_twice_is_pruning_once(family: str) -> None:
    model = tiny_model(family)
    first = non_uniform_plan(model)
    once = pruned(model, first)
    names = list(first)
    uniform = {names[1]: [0, 1, 4, 5]}
    other = {names[1]: [0, 1, 3, 5]} if family == "deepseek_v3" else {names[0]: [1, 2, 3], names[1]: [0, 2, 4, 5]}
    for second in (uniform, other):
        twice, direct = pruned(once, second), pruned(model, compose(first, second))
        assert_identical(snapshot(twice), snapshot(direct))
        assert torch.equal(logits_of(twice), logits_of(direct))
        assert config_of(twice) == config_of(direct)


@every_family
def test_the_models_own_balance_loss_survives_pruning(family: str) -> None:
    """A uniformly pruned model in memory trains like the same model saved and loaded."""
    model = pruned(tiny_model(family), uniform_plan(tiny_model(family)))
    if not hasattr(model.config, "router_aux_loss_coef"):
        pytest.skip("this family has no balance loss of its own")
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    inputs = {"input_ids": tiny_batch(), "labels": tiny_batch(), "output_router_logits": True}
    with torch.no_grad():
        expected, found = fresh.eval()(**inputs), model.eval()(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=0)


# -------------------------------------------------------------------------------------------- refusals

FAULTS: dict[str, tuple[list[int], str]] = {
    "below top_k": ([4], "top_k=2"),
    "an id out of range": ([0, 1, 8], "expert 8"),
    "a negative id": ([-1, 0, 1], "expert -1"),
    "the same id twice": ([0, 1, 1, 2], "ascending"),
    "ids out of order": ([2, 0, 1], "ascending"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plan_changes_nothing(fault: str, tmp_path: Path) -> None:
    """All or nothing: the first layer of the plan is sound, the second is not."""
    model = tiny_model("mixtral")
    ids, said = FAULTS[fault]
    first, second = (layer.name for layer in find_moe_layers(model))
    weights, config = snapshot(model), model.config.to_dict()
    with pytest.raises(InputError) as refusal:
        keep_experts(model, {first: [0, 1, 2], second: ids})
    assert_one_line(refusal.value, second, said)
    assert_identical(snapshot(model), weights)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(InputError) as refusal:
        compact_checkpoint(str(tmp_path / "full"), {first: [0, 1, 2], second: ids}, tmp_path / "out")
    assert_one_line(refusal.value, second, said)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_layer_that_is_not_there_changes_nothing() -> None:
    model = tiny_model("mixtral")
    first = find_moe_layers(model)[0].name
    weights = snapshot(model)
    with pytest.raises(InputError) as refusal:
        keep_experts(model, {first: [0, 1, 2], "model.layers.7.mlp": [0, 1, 2]})
    assert_one_line(refusal.value, "model.layers.7.mlp", first)
    assert_identical(snapshot(model), weights)


def test_group_limited_routers_want_equal_groups() -> None:
    model = tiny_model("deepseek_v3")
    name = find_moe_layers(model)[0].name
    weights = snapshot(model)
    for ids, counts in (([0, 1, 2, 4, 5], "[3, 2]"), ([0, 1, 2, 3, 5, 6], "[4, 2]"), ([0, 1, 2, 3], "[4, 0]")):
        with pytest.raises(InputError) as refusal:
            keep_experts(model, {name: ids})
        assert_one_line(refusal.value, name, "2 groups", counts)
    assert_identical(snapshot(model), weights)
    for ids in ([0, 1, 2, 5, 6, 7], [2, 3, 4, 6]):
        keep = {layer.name: ids if layer.name == name else list(range(8)) for layer in find_moe_layers(model)}
        with masked(model, keep):
            expected = logits_of(model)
        torch.testing.assert_close(logits_of(pruned(model, keep)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "groups", "topk_group", "top_k", "fewest"),
    [(16, 2, 1, 4, 4), (16, 2, 2, 4, 2), (16, 4, 2, 6, 3), (16, 4, 2, 2, 2), (16, 4, 3, 4, 2)],
)
def test_each_group_keeps_enough_for_the_router(
    num_experts: int, groups: int, topk_group: int, top_k: int, fewest: int
) -> None:
    """``topk_group`` groups must hold ``top_k`` experts, and a group is ranked by its two best."""
    model = tiny_model(
        "deepseek_v3",
        n_routed_experts=num_experts,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
    )
    size = num_experts // groups

    def plan(per_group: int) -> Keep:
        ids = [group * size + 1 + i for group in range(groups) for i in range(per_group)]
        return {layer.name: ids for layer in find_moe_layers(model)}

    with pytest.raises(InputError) as refusal:
        keep_experts(model, plan(fewest - 1))
    assert_one_line(refusal.value, f"needs {fewest * groups}", f"top_k={top_k}", f"{groups} groups")
    with masked(model, plan(fewest)):
        expected = logits_of(model)
    torch.testing.assert_close(logits_of(pruned(model, plan(fewest))), expected, atol=1e-5, rtol=1e-5)
