"""The spread of outputs survives a mean that dwarfs it."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.stats.expert_stats import ExpertStats


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e3, 5e3])
def test_spread_beside_a_large_mean(mean: float) -> None:
    rows, width = 1300, 64  # more than one block
    outputs = (mean + torch.randn(rows, width, generator=torch.Generator().manual_seed(0))).float()
    stats = ExpertStats(1, width, 10)
    stats._add_outputs(outputs, torch.ones(rows), [rows])
    variance = stats.output_sq_EH[0] / rows - (stats.output_sum_EH[0] / rows).square()
    torch.testing.assert_close(variance.sqrt(), outputs.double().std(0, correction=0), rtol=1e-4, atol=0)
