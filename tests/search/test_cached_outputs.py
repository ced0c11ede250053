"""CachedOutputs: the errors of sets of experts are those of running the masked block again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.experts import IMPLEMENTATION
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.search import cached_outputs
from lightning_moe.search.cached_outputs import CachedOutputs, bytes_per_token
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import uniform_plan
from tests.search.naee_reference import errors_of, one_by_one, sets_of


def padded() -> tuple[Tensor, Tensor]:
    """Four windows: two whole, one that is cut short, one that is blank."""
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[2, 6:], mask[3] = 0, 0
    return tiny_batch(4, 10), mask


@torch.no_grad()
def caches_of(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[CachedOutputs]:
    caches = [CachedOutputs(layer) for layer in find_moe_layers(model)]
    with ExitStack() as watched:
        for cache in caches:
            watched.enter_context(cache.attached())
        for batch in batches:
            for cache in caches:
                cache.next_batch(batch["attention_mask"])
            mask = batch["attention_mask"]
            shown = torch.where(mask.any(-1, keepdim=True), mask, torch.ones_like(mask))  # no token to attend to
            model(batch["input_ids"], attention_mask=shown, use_cache=False)
    return caches


def double(family: str) -> PreTrainedModel:
    """In float64, by the model's own loop over experts."""
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_masked_block(family: str) -> None:
    """On inputs of the full model, and of one whose earlier layers are masked; attention sees no padding here."""
    model = double(family)
    windows = one_by_one(tiny_batch(2, 8))
    first, second = find_moe_layers(model)
    earlier = {first.name: uniform_plan(model)[first.name]}
    cut = caches_of_masked(model, windows, earlier)
    for cache, masked in (*((cache, {}) for cache in caches_of(model, windows)), (cut[1], earlier)):
        keeps = [*sets_of(cache.layer, 4)[::7], ()]
        with torch.no_grad():
            found = cache.errors(keeps).tolist()
            assert float(cache.errors([tuple(range(8))])) == 0.0
        assert found == pytest.approx(errors_of(model, cache.layer, windows, keeps, masked), rel=1e-9)
    assert second.name == cut[1].layer.name


def caches_of_masked(
    model: PreTrainedModel, windows: Sequence[Mapping[str, Tensor]], keep: dict[str, list[int]]
) -> list[CachedOutputs]:
    with mask_plan(find_moe_layers(model), keep):
        return caches_of(model, windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_models_own_precision(dtype: torch.dtype) -> None:
    """The reference rounds the sum that we have in float64."""
    model = tiny_model("qwen3_moe").to(dtype)
    windows = one_by_one(tiny_batch(2, 8))
    cache = caches_of(model, windows)[0]
    keeps = sets_of(cache.layer, 4)[::7]
    expected = errors_of(model, cache.layer, windows, keeps, {})
    with torch.no_grad():
        found = cache.errors(keeps).tolist()
    assert found == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_padding_counts_nothing(family: str) -> None:
    model = double(family)
    ids, mask = padded()
    cache = caches_of(model, [{"input_ids": ids, "attention_mask": mask}])[1]
    keeps = sets_of(cache.layer, 4)[::5]
    with torch.no_grad():
        found = cache.errors(keeps).tolist()
    assert found == pytest.approx(errors_of(model, cache.layer, one_by_one(ids, mask), keeps, {}), rel=1e-9)


@torch.no_grad()
def test_batches_and_the_sizes_of_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows one by one or all together; outputs, tokens and sets in pieces that end anywhere."""
    model = double("deepseek_v3")
    ids, mask = padded()
    whole = [{"input_ids": ids, "attention_mask": mask}]
    keeps = [*sets_of(find_moe_layers(model)[0], 4)[::5], ()]
    expected = [cache.errors(keeps) for cache in caches_of(model, whole)]
    for rows, elements in ((8 * 3, 64 * 5), (1, 64 * 100)):
        monkeypatch.setattr(cached_outputs, "ROWS", rows)
        monkeypatch.setattr(cached_outputs, "ELEMENTS", elements)
        for batches in (whole, one_by_one(ids, mask)):
            for cache, errors in zip(caches_of(model, batches), expected, strict=True):
                # This router works in float32, whose products round by the number of rows.
                torch.testing.assert_close(cache.errors(keeps), errors, rtol=1e-7, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", IMPLEMENTATION])
@torch.no_grad()
def test_the_model_gives_what_it_would_give(implementation: str) -> None:
    model = tiny_model("deepseek_v3")
    model.set_experts_implementation(implementation)
    before = model(tiny_batch()).logits
    hooks = [len(part._forward_pre_hooks) for part in model.modules()]
    caches = [CachedOutputs(layer) for layer in find_moe_layers(model)]
    with caches[0].attached(), caches[1].attached():
        for cache in caches:
            cache.next_batch(torch.ones_like(tiny_batch()))
        assert torch.equal(model(tiny_batch()).logits, before)
    assert torch.equal(model(tiny_batch()).logits, before)
    assert [len(part._forward_pre_hooks) for part in model.modules()] == hooks


@torch.no_grad()
def test_what_a_token_takes() -> None:
    """Never less than is held."""
    for family in ("mixtral", "deepseek_v3"):
        for cache in caches_of(tiny_model(family), [{"input_ids": tiny_batch(), "attention_mask": torch.ones(2, 24)}]):
            held = sum(
                tensor.numel() * tensor.element_size()
                for batch in cache._batches
                for tensor in (batch.gram_TP, batch.replay.logits_TE, batch.window_T)
            )
            assert 0.8 * 48 * bytes_per_token(cache.layer.shape) < held <= 48 * bytes_per_token(cache.layer.shape)
