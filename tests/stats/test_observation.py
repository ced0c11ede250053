"""An observation adds up, whatever its passes, padding and order of experts, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_moe.stats.layer_stats import TENSORS, LayerStats
from lightning_moe.stats.observation import Observation
from tests.helpers.families import FAMILIES, NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.observed_stats import FOUR, WEIGHT_FIELDS, assert_same, observe, parts

TOKEN_FIELDS = tuple(name for name in TENSORS if name not in WEIGHT_FIELDS)

# ------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("family", FOUR)
def test_padding_does_not_count(family: str) -> None:
    model = tiny_model(family)
    long, short = tiny_batch(batch=1, length=24, seed=1), tiny_batch(batch=1, length=13, seed=2)
    padded = torch.cat([long, torch.cat([short, torch.full((1, 11), 5)], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, 13:] = 0
    alone, together = observe(model, [long, short]), observe(model, [(padded, mask)])
    for found, expected in zip(together, alone, strict=True):
        assert found.tokens == 24 + 13
        assert_same(found, expected)


def test_a_batch_of_padding_adds_nothing() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    observation = Observation(model)
    (expected, _) = observe(model, [batch], observation)
    (found, _) = observe(model, [(batch, torch.zeros_like(batch))], observation)
    assert_same(found, expected, tolerance=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_permuting_experts_permutes_the_statistics(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    order = [5, 7, 4, 6, 2, 0, 3, 1]  # whole groups of four change places, as DeepSeek-V3 wants
    expected = observe(model, [batch])
    with torch.no_grad():
        for router, experts in parts(model):
            for name, tensor in [*router.named_parameters(), *router.named_buffers(), *experts.named_parameters()]:
                if tensor.dim() and tensor.shape[0] == NUM_EXPERTS:
                    tensor.copy_(tensor[order].clone())
                else:
                    raise AssertionError(f"{name} has no row per expert")
    for found, before in zip(observe(model, [batch]), expected, strict=True):
        moved = {}
        for name in TENSORS:
            value = getattr(before, name)
            if name.endswith("_EE"):
                value = value[order][:, order]
            elif name not in ("tokens", "ratio_R", "layer_cosine", "block_cosine"):
                value = value[order]
            moved[name] = value
        assert_same(found, LayerStats(before.shape, **moved))


@pytest.mark.parametrize("family", FOUR)
def test_two_passes_add_up_to_one(family: str) -> None:
    """In one observation, in two whose sums are added, and in one that goes on from saved sums."""
    model, batch = tiny_model(family), tiny_batch(batch=4)
    whole = observe(model, [batch])
    for found, expected in zip(observe(model, [batch[:1], batch[1:]]), whole, strict=True):
        assert_same(found, expected)
    first, second = Observation(model), Observation(model)
    halves = observe(model, [batch[:1]], first), observe(model, [batch[1:]], second)
    for one, other, expected in zip(*halves, whole, strict=True):
        sums = {name: getattr(one, name) + getattr(other, name) for name in TOKEN_FIELDS}
        assert_same(replace(one, **sums), expected)
    second.load_sums({name: value.clone() for name, value in first.sums().items()})
    for found, expected in zip(observe(model, [batch[1:]], second), whole, strict=True):
        assert_same(found, expected)


def test_statistics_are_values() -> None:
    """What was computed does not change when the observation goes on."""
    model, batch = tiny_model("mixtral"), tiny_batch()
    observation = Observation(model)
    (stats, _) = observe(model, [batch], observation)
    before = {name: getattr(stats, name).clone() for name in TENSORS}
    (twice, _) = observe(model, [batch], observation)
    assert twice.tokens == 2 * before["tokens"]
    for name in TENSORS:
        assert torch.equal(getattr(stats, name), before[name]), name


def test_saved_sums_are_values() -> None:
    """Going on from saved sums does not change what was saved."""
    model, batch = tiny_model("mixtral"), tiny_batch()
    observation = Observation(model)
    observe(model, [batch], observation)
    saved = observation.sums()
    before = {name: value.clone() for name, value in saved.items()}
    resumed = Observation(model)
    resumed.load_sums(saved)
    observe(model, [batch], resumed)
    for name, value in before.items():
        assert torch.equal(saved[name], value), name


def test_loaded_sums_are_what_is_computed() -> None:
    """Also in an observation that was asked before."""
    model, batch = tiny_model("mixtral"), tiny_batch()
    observation = Observation(model)
    (expected, _) = observe(model, [batch], observation)
    other = Observation(model)
    observe(model, [batch[:1]], other)
    other.load_sums({name: value.clone() for name, value in observation.sums().items()})
    assert_same(other.compute()[0], expected, tolerance=0)


# ----------------------------------------------------------------------------------------------- a guest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_observing_changes_nothing(family: str, implementation: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        expected = model(batch).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    observation = Observation(model)
    observation.next_batch(batch)
    with torch.no_grad():
        with observation.attached(model):
            torch.testing.assert_close(model(batch).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(batch).logits, expected)
    assert set(model.get_experts_implementation().values()) == {implementation}
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_observing_lets_gradients_be() -> None:
    """A model may train while it is watched."""
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        observation = Observation(model)
        observation.next_batch(batch)
        if watched:
            with observation.attached(model):
                model(batch, labels=batch).loss.backward()
            assert observation.compute()[0].tokens == batch.numel()
        else:
            model(batch, labels=batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_observing_ends_with_the_forward_that_fails() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(RuntimeError, match="stop"), Observation(model).attached(model):
        raise RuntimeError("stop")
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    assert not any(router._forward_hooks for router, _ in parts(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_can_be_observed(dtype: torch.dtype) -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    expected = observe(model, [batch])
    found = observe(model.to(dtype), [batch])
    for layer, exact in zip(found, expected, strict=True):
        assert layer.tokens == exact.tokens and layer.count_E.sum() == exact.count_E.sum()
        assert all(bool(getattr(layer, name).isfinite().all()) for name in TENSORS)
        if dtype == torch.float64:
            assert_same(layer, exact)
