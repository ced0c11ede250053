"""Statistics equal a slow reference, and are sums: over shards and over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lightning_moe.moe.experts import Assignments
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.expert_stats import ExpertStats
from lightning_moe.stats.layer_stats import TENSORS
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.forked_ranks import start_ranks
from tests.helpers.observed_stats import FOUR, assert_field, observe, parts
from tests.helpers.plans import fewest_plan, non_uniform_plan
from tests.helpers.ranks import observe_share
from tests.helpers.reference import statistics as reference
from tests.helpers.reference.raw_layers import RawLayer, SeenToken, Visit, raw_layers
from tests.helpers.reference.vectors import softmax

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
