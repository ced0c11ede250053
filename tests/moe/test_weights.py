"""Weights: counts of real models, and each rank's part as FSDP2 makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_moe.moe.checkpoints import new_model
from lightning_moe.moe.lone_config import lone_config
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.split_tensors import is_split, local
from lightning_moe.moe.weights import active_parameters, readable_count, total_parameters, weights_of
from tests.helpers.families import FAMILIES, tiny_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # As their makers say, in 1e9.
    [
        ("mixtral_8x7b", 46.7, 12.9),
        ("mixtral_8x22b", 140.6, 39.1),
        ("qwen2_57b_a14b", 57.4, 14.2),
        ("deepseek_moe_16b", 16.4, 2.8),
    ],
)
def test_real_models_have_their_size(name: str, total: float, active: float) -> None:
    with torch.device("meta"):
        weights = weights_of(new_model(lone_config(str(CONFIGS / f"{name}.json"))))
    assert round(total_parameters(weights) / 1e9, 1) == total
    assert active_parameters(weights) / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
def test_parts_of_ranks_are_those_of_fsdp2(ranks: int) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        for family in FAMILIES:
            model = new_model(tiny_config(family), torch.float32)
            weights = {weight.name: weight for weight in weights_of(model)}
            Sharding(mesh).shard(model)
            for name, parameter in model.named_parameters():
                assert is_split(parameter) == weights[name].split, (family, name)
                assert local(parameter).numel() == weights[name].on_rank(ranks), (family, name)
    finally:
        torch.distributed.destroy_process_group()


def test_shared_weights_count_once() -> None:
    tied, plain = (
        weights_of(new_model(tiny_config("mixtral", tie_word_embeddings=tie), torch.float32)) for tie in (True, False)
    )
    assert total_parameters(plain) - total_parameters(tied) == 128 * 32
    assert [weight.name for weight in plain if weight.looked_up] == ["model.embed_tokens.weight"]
    assert not any(weight.looked_up for weight in tied)


def test_experts_at_work() -> None:
    """Of 8 experts 2 work on a token; their weights are the stacks, everything else always works."""
    weights = weights_of(new_model(tiny_config("mixtral"), torch.float32))
    stacks = sum(weight.numel for weight in weights if weight.stack)
    assert stacks == 2 * 8 * 3 * 32 * 48
    assert active_parameters(weights) == total_parameters(weights) - stacks * 6 // 8


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("mixtral", ["gate_up_proj", "down_proj"]),  # of w1 and w3, and of w2
        ("qwen2_moe", ["down_proj", "gate_up_proj"]),
        ("gpt_oss", []),  # whose stacks lie on disk as they are
    ],
)
def test_order_in_which_stacks_are_made(family: str, order: list[str]) -> None:
    weights = [weight for weight in weights_of(new_model(tiny_config(family))) if weight.layer == 1]
    made = {weight.made: weight.name.rpartition(".")[2] for weight in weights if weight.made is not None}
    assert [made[number] for number in sorted(made)] == order


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0K"),
        (7_340_032, "7.3M"),
        (999_949, "999.9K"),
        (999_950, "1.0M"),
        (46_702_792_704, "46.7B"),
        (671_026_419_200, "671.0B"),
        (10**12, "1.0T"),
    ],
)
def test_counts_are_readable(parameters: int, said: str) -> None:
    assert readable_count(parameters) == said
