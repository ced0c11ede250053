"""How alike experts are: minibatch CKA against exact CKA, and the median of the ratio of weights."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.moe.experts import Assignments
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats import minibatch_cka
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.minibatch_cka import Kernel, pair_hsic
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.similarity import gamma1, gamma2, similarity, skip_tables
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.reference import similarity as reference
from tests.helpers.reference.raw_layers import RawLayer, SeenToken, Visit
from tests.helpers.reference.stock_experts import watch

WIDTH = 6


def blank_stats() -> LayerStats:
    """The statistics of a layer of 8 experts that saw nothing."""
    return Observation(tiny_model("mixtral")).compute()[0]


def outputs_of(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    """What every expert would put out for every token, ``(T, E, H)``: linear maps that share a part."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, WIDTH, generator=generator)
    shared, own = torch.randn(2, num_experts, WIDTH, WIDTH, generator=generator)
    strength = torch.linspace(0, 1.5, num_experts).view(-1, 1, 1)
    return torch.einsum("th,ehw->tew", inputs, shared[:1] + strength * own) + 3.0


def assignments_of(outputs_TEH: Tensor, ids_TK: Tensor) -> Assignments:
    num_tokens, num_experts = outputs_TEH.shape[:2]
    expert_N, order_N = ids_TK.flatten().sort(stable=True)
    token_N = order_N // ids_TK.shape[1]
    count_E = torch.bincount(expert_N, minlength=num_experts)
    return Assignments(outputs_TEH[token_N, expert_N], token_N, torch.ones(num_tokens * ids_TK.shape[1]), count_E)


def choices(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices


def cka(
    outputs_TEH: Tensor,
    ids_TK: Tensor,
    sequence_T: Tensor | None = None,
    mask_T: Tensor | None = None,
    kernel: Kernel = "linear",
) -> Tensor:
    num_tokens = ids_TK.shape[0]
    sequence_T = torch.zeros(num_tokens, dtype=torch.long) if sequence_T is None else sequence_T
    mask_T = torch.ones(num_tokens, dtype=torch.bool) if mask_T is None else mask_T
    hsic_EE, own_EE = pair_hsic(assignments_of(outputs_TEH, ids_TK), ids_TK, sequence_T, mask_T, kernel)
    return similarity(replace(blank_stats(), hsic_EE=hsic_EE, own_hsic_EE=own_EE))


def test_a_copy_is_fully_alike() -> None:
    """Also of another size and place, which CKA does not see."""
    outputs = outputs_of(60, 4)
    outputs[:, 2] = outputs[:, 0]
    outputs[:, 3] = 5 * outputs[:, 0] - 7
    for kernel in ("linear", "rbf"):
        found = cka(outputs, choices(60, 4, 3), kernel=kernel)  # type: ignore[arg-type]
        torch.testing.assert_close(found[0, [2, 3]], torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)
        assert found[0, 1] < 0.99 and torch.equal(found, found.T) and bool((found.diagonal() == 1).all())


def test_minibatches_approach_cka_on_all_tokens() -> None:
    """200 sequences of 120 tokens; each pair of 4 experts shares a sixth of them, 16 of a sequence count."""
    outputs, ids = outputs_of(24_000, 4), choices(24_000, 4, 2)
    found = cka(outputs, ids, torch.arange(24_000) // 120)
    for i in range(4):
        for j in range(i):
            both = ((ids == i).any(1) & (ids == j).any(1)).nonzero().squeeze(1)
            exact = reference.linear_cka(outputs[both, i], outputs[both, j])
            assert float(found[i, j]) == pytest.approx(exact, abs=0.03)


def test_unlike_experts_are_not_alike() -> None:
    """An estimator with a bias would find random outputs alike: with 16 tokens and 64 dimensions, by about 0.8."""
    outputs = torch.randn(9600, 2, 64, generator=torch.Generator().manual_seed(0))
    assert cka(outputs, choices(9600, 2, 2), torch.arange(9600) // 16)[0, 1] < 0.03


@settings(max_examples=25)
@given(seed=st.integers(0, 99), top_k=st.integers(1, 4), length=st.integers(1, 40), count=st.integers(1, 4))
def test_sums_equal_the_reference_whatever_the_chunks(seed: int, top_k: int, length: int, count: int) -> None:
    """Sequences one at a time or all at once, with padding at their ends, and many tokens of one pair."""
    num_tokens = length * count
    outputs, ids = outputs_of(num_tokens, 5, seed), choices(num_tokens, 5, top_k, seed)
    if seed % 2:
        ids[:] = torch.arange(top_k)
    sequence_T = torch.arange(num_tokens) // length
    mask_T = torch.arange(num_tokens) % length < 1 + seed % 40
    tokens = [
        SeenToken(0, [], [Visit(e, 1.0, outputs[t, e].tolist()) for e in ids[t].tolist()], int(sequence_T[t]))
        for t in range(num_tokens)
        if mask_T[t]
    ]
    expected = reference.skipping_stats(RawLayer(5, 1, tokens))
    for values in (1, 1 << 24):
        whole = minibatch_cka.CHUNK_VALUES
        minibatch_cka.CHUNK_VALUES = values
        try:
            found = pair_hsic(assignments_of(outputs, ids), ids, sequence_T, mask_T)
        finally:
            minibatch_cka.CHUNK_VALUES = whole
        for name, table in zip(("hsic_EE", "own_hsic_EE"), found, strict=True):
            scale = max(1.0, float(table.abs().max()))
            torch.testing.assert_close(table / scale, torch.tensor(expected[name]).double() / scale, atol=1e-5, rtol=0)


def test_long_sequences_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert shall get about 128: of 4 experts, two per token, so 256 tokens, so every fifth of 1200. Padding is
    no part of the count."""
    ids = choices(1200, 4, 2)
    padded = torch.cat([torch.zeros(100, 2, dtype=torch.long), ids])
    mask_T = torch.arange(1300) >= 100
    outputs = outputs_of(1300, 4)
    every_fifth = torch.zeros(1300, dtype=torch.bool)
    every_fifth[100::5] = True
    monkeypatch.setattr(minibatch_cka, "PER_PAIR", 1000)
    found = cka(outputs, padded, mask_T=mask_T)
    torch.testing.assert_close(found, cka(outputs, padded, mask_T=every_fifth))
    assert not torch.equal(found, cka(outputs, padded, mask_T=every_fifth.roll(1)))


def test_pairs_never_seen_together_get_the_mean_of_the_layer() -> None:
    ids = choices(40, 3, 2)
    outputs = torch.cat([outputs_of(40, 3), torch.zeros(40, 1, WIDTH)], 1)  # nobody is sent to the fourth
    found = cka(outputs, ids)
    mean = found[:3, :3][~torch.eye(3, dtype=torch.bool)].mean()
    torch.testing.assert_close(found[3, :3], mean.expand(3))
    assert bool((similarity(blank_stats()) == 1).all()) and bool((gamma2(blank_stats()) == 1).all())


def test_gamma2_is_likeness_over_the_mean() -> None:
    stats = observed()
    likeness, pairs = similarity(stats), ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(gamma2(stats)[pairs], (likeness / likeness[pairs].mean())[pairs])
    assert bool((gamma2(stats).diagonal() == 1).all())


def observed(family: str = "mixtral", layer: int = 0) -> LayerStats:
    model, batch = tiny_model(family), tiny_batch(batch=8)
    observation = Observation(model)
    observation.next_batch(batch)
    with torch.no_grad(), observation.attached(model):
        model(batch)
    return observation.compute()[layer]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_gamma1_is_the_median_ratio(family: str) -> None:
    model = tiny_model(family)
    layers = find_moe_layers(model)
    calls = watch(model, [(layer.router, layer.experts) for layer in layers], input_ids=tiny_batch(batch=8))
    for turn, call in enumerate(calls):
        ratios = [min(pair) / max(pair) for pair in call.weights_TK.tolist()]
        found, bin_width = gamma1(observed(family, turn)), 1 / 4096
        assert statistics.median_low(ratios) - bin_width <= found <= statistics.median_high(ratios) + bin_width


def test_a_median_by_hand() -> None:
    """Three tokens in bin 1024 of 4096 and one in bin 0: half of four is passed after a third of bin 1024."""
    ratio_R = torch.zeros(4096, dtype=torch.float64)
    ratio_R[1024], ratio_R[0] = 3, 1
    assert gamma1(replace(blank_stats(), ratio_R=ratio_R)) == pytest.approx((1024 + 1 / 3) / 4096)
    assert gamma1(blank_stats()) == 0.0


def test_tables_are_of_decoder_layers() -> None:
    model = tiny_model("deepseek_v3")
    tables = skip_tables(Observation(model).compute())
    assert list(tables) == [1, 2] and tables[1].gamma1 == 0.0 and tables[1].gamma2_EE.shape == (8, 8)
