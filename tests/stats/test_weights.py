"""Figures of the weights alone: norms, cosines and stable ranks equal a slow reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.stats.weights import largest_singular_value, stable_rank, weight_stats
from tests.helpers.families import FAMILIES, NUM_EXPERTS, VOCAB, tiny_model
from tests.helpers.observed_stats import WEIGHT_FIELDS, assert_field
from tests.helpers.reference import statistics as reference
from tests.helpers.reference.raw_layers import RawLayer
from tests.helpers.reference.stock_experts import expert_matrices, router_rows


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
