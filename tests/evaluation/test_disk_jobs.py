"""Jobs from file to file: what the choice of weights makes on the way, and the rest by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_moe.evaluation.device import READING
from lightning_moe.evaluation.disk_jobs import CHOOSING, choice_bytes, cutting, thinning
from lightning_moe.moe.live_bytes import LiveBytes
from lightning_moe.moe.semi_structured import Matrix, Pattern, Rule, zero_in_matrix
from lightning_moe.moe.weight_shards import SHARD_BYTES
from lightning_moe.moe.weights import Weight

F32 = torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["wanda", "magnitude", "random"])
def test_a_choice_takes_what_it_takes(rule: Rule, dtype: torch.dtype) -> None:
    """Wanda's to the byte; the others no more."""
    weight_OI, norm_EI = torch.randn(48, 64).to(dtype), torch.rand(1, 64) + 0.1
    pattern = Pattern(rule, norms={"layer": {"stack": norm_EI}})
    with LiveBytes([weight_OI, norm_EI]) as live:
        zero_in_matrix(weight_OI, Matrix("layer", "stack", 0, 0), pattern)
    expected = choice_bytes((48, 64), dtype)
    assert live.peak == expected if rule == "wanda" else live.peak <= expected


def test_thinning_by_hand() -> None:
    """A layer of 2 experts of 4 x 8, gate and up in one stack; all of it goes into one file."""
    weights = [
        Weight("head", None, (100, 4), F32),
        Weight("0.experts.gate_up_proj", 0, (2, 16, 4), F32, stack=True, made=0),
        Weight("0.experts.down_proj", 0, (2, 4, 8), F32, stack=True, made=1),
    ]
    found = thinning(weights, F32)
    assert found.host == 4 * (128 + 64) + max(choice_bytes((8, 4), F32), choice_bytes((4, 8), F32))
    assert found.seconds == pytest.approx(2 * 4 * (400 + 192) / READING + 192 / CHOOSING)
    assert thinning(weights, torch.bfloat16).host < found.host


def test_a_file_and_the_next_tensor_are_held() -> None:
    """A matrix where experts lie on disk one by one, else the stack of all of them."""
    shape = (64, 4096, 8192)
    hosts = [thinning([Weight("down_proj", 0, shape, F32, stack=True, made=made)], F32).host for made in (0, None)]
    choice = choice_bytes((4096, 8192), F32)
    assert hosts[0] == SHARD_BYTES + 4 * 4096 * 8192 + choice
    assert hosts[1] == min(SHARD_BYTES + 4 * 64 * 4096 * 8192, 4 * 64 * 4096 * 8192) + choice


def test_a_cut_reads_and_writes_what_stays() -> None:
    weights = [Weight("head", None, (100, 4), F32), Weight("down_proj", 0, (4, 5, 5), F32, stack=True)]
    found = cutting(weights, 0.5, torch.bfloat16)
    assert found.host == 2 * (400 + 50) and found.seconds == 2 * found.host / READING
