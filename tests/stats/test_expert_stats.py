"""Statistics equal a slow reference, and are sums: over shards, over passes, over ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.experts import Assignments
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.layer_drop import layer_scores
from lightning_moe.stats.expert_stats import ExpertStats
from lightning_moe.stats.layer_stats import TENSORS, LayerStats
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.similarity import router_similarity
from lightning_moe.stats.store import ModelStats, load_stats
from lightning_moe.stats.weights import largest_singular_value, stable_rank, weight_stats
from tests.helpers.families import FAMILIES, NUM_EXPERTS, VOCAB, tiny_batch, tiny_model
from tests.helpers.forked_ranks import start_ranks
from tests.helpers.plans import fewest_plan, non_uniform_plan
from tests.helpers.ranks import observe_share
from tests.helpers.reference import statistics as reference
from tests.helpers.reference.raw_layers import RawLayer, SeenToken, Visit, raw_layers
from tests.helpers.reference.stock_experts import expert_matrices, router_rows
from tests.helpers.reference.vectors import softmax

WEIGHT_FIELDS = ("router_norm_E", "weight_norm_E", "weight_cosine_EE", "stable_rank_E")
TOKEN_FIELDS = tuple(name for name in TENSORS if name not in WEIGHT_FIELDS)
COUNTS = ("tokens", "count_E", "together_EE", "seen_EV", "outliers_E")
"""Whole numbers: no rounding excuses a difference."""

FOUR = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"]


def parts(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    return [(layer.router, layer.experts) for layer in find_moe_layers(model)]


def observe(
    model: PreTrainedModel, batches: Iterable[Tensor | tuple[Tensor, Tensor]], into: Observation | None = None
) -> list[LayerStats]:
    observation = into or Observation(model)
    with torch.no_grad(), observation.attached(model):
        for batch in batches:
            input_ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            observation.next_batch(input_ids, mask)
            model(input_ids, attention_mask=mask)
    return observation.compute()


def assert_field(name: str, found: Tensor, expected: Any, tolerance: float) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    if name in COUNTS:
        assert torch.equal(found, expected), f"{name}: {found} is not {expected}"
        return
    if name == "ratio_R":  # rounding may carry a token over the edge of its bin, no further
        below, expected_below = found.cumsum(0), expected.cumsum(0)
        assert below[-1] == expected_below[-1]
        assert bool((below[1:] >= expected_below[:-1]).all() and (below[:-1] <= expected_below[1:]).all())
        return
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(
        found, expected, atol=tolerance * scale, rtol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def assert_same(found: LayerStats, expected: LayerStats, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    for name in TENSORS:
        assert getattr(found, name).shape == getattr(expected, name).shape, name
        assert_field(name, getattr(found, name), getattr(expected, name), tolerance)


# ----------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_the_reference(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(length=16 if family in FOUR else 8)
    model.set_experts_implementation("eager")
    raws = raw_layers(model, parts(model), batch)
    for found, raw in zip(observe(model, [batch]), raws, strict=True):
        assert found.tokens.dtype == torch.float64 and found.seen_EV.dtype == torch.bool
        expected = reference.layer_stats(raw) | reference.weight_stats(raw)
        assert expected.keys() == set(TENSORS)
        for name in TENSORS:
            assert getattr(found, name).shape == torch.as_tensor(expected[name]).shape, name
            assert_field(name, getattr(found, name), expected[name], 1e-5)


@pytest.mark.parametrize("family", FOUR)
def test_statistics_of_a_pruned_model_equal_the_reference(family: str) -> None:
    """As the rounds of iterative pruning need it: the layers differ, or the router takes every expert."""
    for plan in (non_uniform_plan, fewest_plan):
        model = tiny_model(family)
        keep_experts(model, plan(model))
        model.set_experts_implementation("eager")
        batch = tiny_batch(length=8)
        for found, raw in zip(observe(model, [batch]), raw_layers(model, parts(model), batch), strict=True):
            expected = reference.layer_stats(raw) | reference.weight_stats(raw)
            for name in TENSORS:
                assert_field(name, getattr(found, name), expected[name], 1e-5)


def test_a_single_expert_has_statistics() -> None:
    """A router with top_k = 1 can be pruned to one expert; all shapes stay ``(E, ...)``."""
    model = tiny_model("mixtral", num_experts_per_tok=1)
    keep_experts(model, {layer.name: [3] for layer in find_moe_layers(model)})
    (found, _) = observe(model, [tiny_batch(length=8)])
    raw = raw_layers(model, parts(model), tiny_batch(length=8))[0]
    expected = reference.layer_stats(raw) | reference.weight_stats(raw)
    for name in TENSORS:
        assert getattr(found, name).shape == torch.as_tensor(expected[name]).shape, name
        assert_field(name, getattr(found, name), expected[name], 1e-5)


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


# --------------------------------------------------------------------------------------- raw shards, fast


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> dict[str, Tensor]:
    """A layer's raw happenings, a row per token."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
    return {
        "logits": logits_TE,
        "weights": weights_TK,
        "ids": ids_TK,
        "outputs": torch.randn(num_tokens, top_k, 6, generator=generator),
        "token_ids": torch.randint(0, 20, (num_tokens,), generator=generator),
        "mask": torch.rand(num_tokens, generator=generator) > 0.2,
    }


def update(stats: ExpertStats, rows: dict[str, Tensor], num_experts: int) -> None:
    """Hand rows over as the experts function does, sorted by expert, one by one.

    They are one sequence, or those that ``rows["sequence"]`` numbers.
    """
    assignments = [
        (int(rows["ids"][t, k]), t, k) for t in range(rows["ids"].shape[0]) for k in range(rows["ids"].shape[1])
    ]
    assignments.sort(key=lambda assignment: assignment[0])
    stats.update(
        Routing(rows["logits"], rows["weights"], rows["ids"]),
        Assignments(
            torch.stack([rows["outputs"][t, k] for _, t, k in assignments]),
            torch.tensor([t for _, t, _ in assignments]),
            torch.stack([rows["weights"][t, k] for _, t, k in assignments]),
            torch.tensor([sum(e == expert for e, _, _ in assignments) for expert in range(num_experts)]),
        ),
        rows["token_ids"],
        rows["mask"],
        rows.get("sequence"),
    )


@settings(max_examples=40)
@given(data=st.data(), num_tokens=st.integers(1, 24), top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_shards_add_up(data: st.DataObject, num_tokens: int, top_k: int, seed: int) -> None:
    rows = routed(num_tokens, 5, top_k, seed)
    cuts = data.draw(st.lists(st.integers(0, num_tokens), max_size=3).map(sorted))
    rows["sequence"] = torch.tensor([sum(cut <= token for cut in cuts) for token in range(num_tokens)])
    whole, shards = ExpertStats(5, 6, 20), ExpertStats(5, 6, 20)
    update(whole, rows, 5)
    for start, end in zip([0, *cuts], [*cuts, num_tokens], strict=True):
        if start < end:
            shard = {name: value[start:end] for name, value in rows.items()}
            update(shards, shard | {"sequence": shard["sequence"] - shard["sequence"][0]}, 5)
    for name in whole.names:
        assert_field(name, getattr(shards, name), getattr(whole, name), 1e-6)


@settings(max_examples=40)
@given(num_tokens=st.integers(1, 24), top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_raw_sums_equal_the_reference(num_tokens: int, top_k: int, seed: int) -> None:
    """Few tokens: experts with none and with one, and masked ones among them."""
    rows = routed(num_tokens, 5, top_k, seed)
    rows["mask"][0] = True
    stats = ExpertStats(5, 6, 20)
    update(stats, rows, 5)
    tokens = [
        SeenToken(
            int(rows["token_ids"][t]),
            softmax(rows["logits"][t].tolist()),
            [
                Visit(int(e), float(w), f.tolist())
                for e, w, f in zip(rows["ids"][t], rows["weights"][t], rows["outputs"][t], strict=True)
            ],
            logits=rows["logits"][t].tolist(),
        )
        for t in range(num_tokens)
        if rows["mask"][t]
    ]
    for name, expected in reference.layer_stats(RawLayer(5, 20, tokens)).items():
        assert_field(name, getattr(stats, name), expected, 1e-5)


def test_more_rows_than_a_block_add_up() -> None:
    """Outputs are summed a block at a time; 1500 tokens of one expert are three blocks."""
    rows = routed(1500, 2, 1)
    rows["ids"][:] = 1
    rows["mask"][:] = True
    whole, pieces = ExpertStats(2, 6, 20), ExpertStats(2, 6, 20)
    update(whole, rows, 2)
    for start in range(0, 1500, 100):
        update(pieces, {name: value[start : start + 100] for name, value in rows.items()}, 2)
    for name in whole.names:
        assert_field(name, getattr(whole, name), getattr(pieces, name), 1e-6)
    assert whole.count_E.tolist() == [0, 1500]


@pytest.mark.parametrize(("ones", "expected"), [(11, 1), (8, 0)])
def test_an_outlier_by_hand(ones: int, expected: int) -> None:
    """Eleven ones and a 13: mean 2, variance (11 * 1 + 121) / 12 = 11; 13 - 2 = 11 is more than 3 sqrt(11) = 9.95.
    Eight ones and a 10: mean 2, variance (8 * 1 + 64) / 9 = 8; 10 - 2 = 8 is less than 3 sqrt(8) = 8.49."""
    output = torch.tensor([1.0] * ones + [float(ones + 2)])
    rows = routed(4, 2, 1)
    rows["outputs"] = output.expand(4, 1, -1).clone()
    rows["ids"][:], rows["mask"][:] = 1, True
    stats = ExpertStats(2, ones + 1, 20)
    update(stats, rows, 2)
    assert stats.outliers_E.tolist() == [0, 4 * expected]


def test_outputs_of_zero_are_counted() -> None:
    """An expert may put out nothing at all; it has no direction then, and no outliers."""
    rows = routed(6, 3, 1)
    rows["outputs"][:] = 0
    rows["mask"][:] = True
    stats = ExpertStats(3, 6, 20)
    update(stats, rows, 3)
    assert all(bool(getattr(stats, name).isfinite().all()) for name in stats.names)
    assert stats.unit_sum_EH.abs().sum() == stats.outliers_E.sum() == stats.norm_E.sum() == 0


# ------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 1, 2, 3], []]], ids=["halves", "all and nothing"])
def test_two_ranks_equal_one(shares: list[list[int]], tmp_path: Path) -> None:
    start_ranks(observe_share, 2, 2, shares, tmp_path)
    model, batch = tiny_model("qwen2_moe"), tiny_batch(batch=4)
    expected = observe(model, [batch[[sequence]] for sequence in range(4)])
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        turn, _, field = name.partition(":")
        assert_field(field, value, getattr(expected[int(turn)], field), 1e-9)


# ----------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_figures_equal_the_reference(family: str) -> None:
    model = tiny_model(family)
    for layer in find_moe_layers(model):
        rows, _ = router_rows(layer.router)
        matrices = [expert_matrices(layer.experts, expert) for expert in range(NUM_EXPERTS)]
        expected = reference.weight_stats(RawLayer(NUM_EXPERTS, VOCAB, [], rows, matrices))
        found = weight_stats(layer)
        assert found.keys() == expected.keys() == set(WEIGHT_FIELDS)
        for name, value in found.items():
            assert value.dtype == torch.float64
            assert_field(name, value, expected[name], 2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_weights_that_are_not_finite_are_refused(value: float, matrix: str) -> None:
    layer = find_moe_layers(tiny_model("mixtral"))[1]
    with torch.no_grad():
        getattr(layer.experts, matrix)[5, 3, 4] = value
    with pytest.raises(InputError) as refusal:
        weight_stats(layer)
    assert "\n" not in str(refusal.value)
    assert layer.name in str(refusal.value) and "[5]" in str(refusal.value)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(0, 40),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_singular_values_equal_those_of_torch(rows: int, columns: int, rank: int, scale: float, seed: int) -> None:
    """Of full rank, rank deficient, and zero."""
    rank = min(rank, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    matrix = (scale * left @ right).float()
    values = torch.linalg.svdvals(matrix.double())
    largest, expected_rank = float(values[0]), reference.stable_rank(matrix)
    assert largest_singular_value(matrix) == pytest.approx(largest, rel=1e-5, abs=1e-30)
    assert stable_rank(matrix) == pytest.approx(expected_rank, rel=2e-5)
    assert expected_rank == 0 or 0.9999 <= stable_rank(matrix) <= rank * 1.0001


@pytest.mark.parametrize("shape", [(300, 200), (96, 700)])
def test_singular_values_of_larger_matrices(shape: tuple[int, int]) -> None:
    """A random matrix has no gap below its largest value: the hardest case. Trained ones have."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(shape, generator=generator)
    peaked = flat + 3 * torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    for matrix, tolerance in ((flat, 1e-5), (peaked, 1e-6)):
        largest = float(torch.linalg.svdvals(matrix.double())[0])
        assert largest_singular_value(matrix) == pytest.approx(largest, rel=tolerance)


# ------------------------------------------------------------------------------------------------- store


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    model = tiny_model("gpt_oss")
    keep_experts(model, non_uniform_plan(model))
    stats = ModelStats("tiny@0123", "data@4567", observe(model, [tiny_batch()]))
    stats.save(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def test_statistics_come_back_from_disk(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    stats = ModelStats("tiny@0123", "data@4567", observe(model, [tiny_batch()]))
    stats.save(tmp_path / "deep" / "stats.safetensors")
    loaded = load_stats(tmp_path / "deep" / "stats.safetensors")
    assert (loaded.model_id, loaded.data_fingerprint) == ("tiny@0123", "data@4567")
    for found, expected in zip(loaded.layers, stats.layers, strict=True):
        assert found.shape == expected.shape
        for name in TENSORS:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).dtype == getattr(expected, name).dtype, name
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["stats.safetensors"]


def rewrite(file: Path, **changes: str | None) -> None:
    """Change entries of a safetensors file's metadata; None takes one out."""
    with safe_open(file, "pt") as stored:
        metadata = dict(stored.metadata())
    for name, value in changes.items():
        metadata.pop(name)
        if value is not None:
            metadata[name] = value
    save_file(load_file(file), file, metadata=metadata)


def refusal_of(file: Path) -> str:
    with pytest.raises(InputError) as refusal:
        load_stats(file)
    message = str(refusal.value)
    assert "\n" not in message and str(file) in message
    return message


def test_missing_statistics_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal_of(tmp_path / "stats.safetensors")


@pytest.mark.parametrize("version", ["2", "3"])
def test_an_older_version_is_read_and_lacks_what_it_did_not_have(version: str, stored: Path) -> None:
    whole = load_stats(stored)
    lacking = ("cosine", "logit_products_EE") if version == "2" else ("cosine",)
    tensors = {name: tensor for name, tensor in load_file(stored).items() if not name.endswith(lacking)}
    with safe_open(stored, "pt") as file:
        metadata = dict(file.metadata())
    save_file(tensors, stored, metadata=metadata | {"version": version})
    older = load_stats(stored)
    for layer, expected in zip(older.layers, whole.layers, strict=True):
        assert all(getattr(layer, name).shape == getattr(expected, name).shape for name in TENSORS)
        assert all(torch.equal(getattr(layer, name), getattr(expected, name)) for name in ("count_E", "hsic_EE"))
        if version == "2":
            with pytest.raises(InputError, match="older version"):
                router_similarity(layer)
    for drops in ("layers", "blocks"):
        with pytest.raises(InputError, match="older version"):
            layer_scores(older, "layer-drop", drops)
    rewrite(stored, version="4")
    refusal_of(stored)


def test_a_newer_version_is_refused_with_its_number(stored: Path) -> None:
    rewrite(stored, version="7")
    assert "version 7" in refusal_of(stored)


@pytest.mark.parametrize("name", ["version", "model_id", "data_fingerprint", "layers"])
def test_statistics_without_their_origin_are_refused(name: str, stored: Path) -> None:
    rewrite(stored, **{name: None})
    refusal_of(stored)


@pytest.mark.parametrize("layers", ["", "[]x", '[{"name": "a"}]', '[{"colour": 1}]', "3"])
def test_statistics_with_other_layers_are_refused(layers: str, stored: Path) -> None:
    rewrite(stored, layers=layers)
    refusal_of(stored)


def test_statistics_without_a_tensor_are_refused(stored: Path) -> None:
    with safe_open(stored, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(stored)
    tensors.pop(next(name for name in tensors if name.endswith("count_E")))
    save_file(tensors, stored, metadata=metadata)
    refusal_of(stored)


def test_foreign_files_are_refused(stored: Path, tmp_path: Path) -> None:
    whole = stored.read_bytes()
    foreign = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "json": json.dumps({}).encode()}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        refusal_of(tmp_path / name)
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert "version" in refusal_of(tmp_path / "model.safetensors")
