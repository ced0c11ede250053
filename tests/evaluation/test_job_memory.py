"""JobMemories: laws over setups, and what jobs refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_moe.cli.search import SearchRequest
from lightning_moe.errors import InputError
from lightning_moe.evaluation.job_memory import JobMemories
from lightning_moe.evaluation.job_passages import gradient_chunks
from lightning_moe.evaluation.job_setup import JOBS, Job, Setup
from lightning_moe.evaluation.remedies import Remedy, remedies
from tests.helpers.families import tiny_config

SEARCH = SearchRequest(0.5).arguments
SPLIT = Setup(4, 1, "moe_fsdp", gpu=True, precision="bf16-mixed", windows=4, seq_len=32)


@pytest.fixture(scope="module")
def memories() -> JobMemories:
    return JobMemories(lambda: tiny_config("mixtral", num_hidden_layers=4, intermediate_size=256), SEARCH)


def total(memories: JobMemories, job: Job, setup: Setup = SPLIT, **changes: Any) -> int:
    return memories.estimate(job, replace(setup, **changes)).fullest.total


@pytest.mark.parametrize("job", JOBS)
def test_more_ranks_take_less(memories: JobMemories, job: Job) -> None:
    sizes = [total(memories, job, devices=devices) for devices in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert total(memories, job, devices=8, replicas=2) == sizes[2]
    assert total(memories, job, devices=4, nodes=2) == sizes[3]


@pytest.mark.parametrize("job", JOBS)
def test_more_windows_take_more(memories: JobMemories, job: Job) -> None:
    assert total(memories, job, windows=16) > total(memories, job)


def test_fewer_weights_that_learn_take_less(memories: JobMemories) -> None:
    sizes = [total(memories, job) for job in ("tune all", "tune routers+norms", "tune routers")]
    assert sizes == sorted(sizes, reverse=True)
    assert total(memories, "tune all", ratio=0.0) > sizes[0] > total(memories, "tune all", ratio=0.75)


def test_fewer_activations_take_less(memories: JobMemories) -> None:
    for job in ("search", "gradients", "tune all"):
        assert total(memories, job, recompute=True, windows=32) < total(memories, job, windows=32)
    assert total(memories, "score", recompute=True) == total(memories, "score")


def test_packed_experts_take_less(memories: JobMemories) -> None:
    for job in ("score", "scan", "2:4-wanda", "search", "evaluate"):
        weights = [memories.estimate(job, replace(SPLIT, quantize=kind)).fullest.weights for kind in (None, "nf4")]
        assert weights[1] < weights[0] / 2


def test_offloading_leaves_what_is_gathered(memories: JobMemories) -> None:
    here, there = (memories.estimate("tune all", replace(SPLIT, cpu_offload=one)) for one in (False, True))
    assert there.fullest.total < here.fullest.total and there.host > here.host
    assert total(memories, "tune all", gpu=False, cpu_offload=True) == total(memories, "tune all", gpu=False)


def test_ddp_takes_a_copy_of_gradients_more(memories: JobMemories) -> None:
    one = Setup(windows=4, seq_len=32)
    ddp = replace(one, devices=2, strategy="ddp")
    gradients = [memories.estimate("tune all", setup).moments[-1].gradients for setup in (one, ddp)]
    assert gradients[1] == 2 * gradients[0]
    for job in ("score", "gradients"):  # neither tunes
        assert total(memories, job, ddp) == total(memories, job, one)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_sums_are_those_of_the_largest_chunk(memories: JobMemories, layers: int) -> None:
    """Of one layer 8 experts with 3 matrices each, in float32, by 4 ranks, whatever the type of the weights."""
    layer = 8 * 3 * 32 * 256 * 4 // 4
    setup = replace(SPLIT, dtype=torch.bfloat16, gradient_memory=(layers + 0.5) * layer / (1 << 30))
    assert memories.estimate("gradients", setup).fullest.statistics == layers * layer
    assert len(gradient_chunks(memories.whole.weights, setup)) == -(-4 // layers)
    if layers > 1:
        fewer = replace(setup, gradient_memory=(layers - 0.5) * layer / (1 << 30))
        assert total(memories, "gradients", fewer) < total(memories, "gradients", setup)
    offloaded = memories.estimate("gradients", replace(setup, cpu_offload=True))
    assert offloaded.fullest.statistics == 0
    there = [memories.estimate("score", replace(setup, cpu_offload=one)).host for one in (False, True)]
    here = memories.estimate("gradients", setup).host
    assert offloaded.host - here == layers * layer + there[1] - there[0]


def test_a_chunk_is_one_layer_at_least(memories: JobMemories) -> None:
    nothing = replace(SPLIT, gradient_memory=1e-9)
    assert [list(chunk) for chunk in gradient_chunks(memories.whole.weights, nothing)] == [[0], [1], [2], [3]]
    assert memories.estimate("gradients", nothing).fullest.statistics == 8 * 3 * 32 * 256


def test_a_scan_takes_an_evaluation_and_what_it_recorded(memories: JobMemories) -> None:
    """Hidden states before 4 layers and after the last, logits of 4 routers, for 4 * 32 tokens; no rank shares them."""
    found = [memories.estimate(job, SPLIT).moments[-1] for job in ("scan", "evaluate")]
    assert found[0].activations - found[1].activations == 4 * 32 * (5 * 32 + 4 * 8) * 4
    assert replace(found[0], activations=0) == replace(found[1], activations=0)


def test_input_norms_stay_beside_a_pass(memories: JobMemories) -> None:
    """Float64, of 8 experts in 4 layers: what gate and up take, and what down takes."""
    assert memories.estimate("2:4-wanda", SPLIT).fullest.statistics == 8 * 4 * (32 + 256) * 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "bf16-true"}, "small steps vanish in bf16-true"),
        ({"quantize": "nf4"}, "leave quantize out"),
        ({"tuned_dtype": torch.bfloat16}, "leave --model.dtype out"),
    ],
)
def test_tuning_refuses(memories: JobMemories, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        memories.estimate("tune all", replace(SPLIT, **changes))
    assert memories.estimate("score", replace(SPLIT, **changes)).fullest.total > 0


def test_other_jobs_refuse(memories: JobMemories) -> None:
    with pytest.raises(InputError, match="packed experts have no gradients; leave quantize out"):
        memories.estimate("gradients", replace(SPLIT, quantize="int8"))
    odd = {"num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 30}
    few = JobMemories(lambda: tiny_config("mixtral", **odd), SEARCH)
    with pytest.raises(InputError, match="none can be removed"):
        few.estimate("scan", SPLIT)
    with pytest.raises(InputError, match="take 30 inputs, no multiple of 4"):
        few.estimate("2:4-wanda", SPLIT)


def test_routers_may_be_tuned_in_a_model_of_16_bits(memories: JobMemories) -> None:
    half = replace(SPLIT, tuned_dtype=torch.bfloat16)
    wide, narrow = (memories.estimate("tune routers", setup).fullest for setup in (SPLIT, half))
    assert narrow.weights < wide.weights and narrow.optimizer == wide.optimizer
    with pytest.raises(InputError, match="vanish"):
        memories.estimate("tune routers", replace(half, precision="32-true"))


def test_remedies_make_it_fit(memories: JobMemories) -> None:
    needed = total(memories, "tune all")
    found = remedies(memories, "tune all", SPLIT, needed - 1)
    changes = [one.change for one in found]
    assert changes == [
        "moe_fsdp's activation_checkpointing",
        "moe_fsdp's cpu_offload",
        "--data.batch_size 2",
        "--recovery.train routers+norms",
        "tuning at a ratio of 0.625",
        "8 devices (1 x 8)",
    ]
    assert all(one.total < needed for one in found)
    assert found[0] == Remedy(changes[0], total(memories, "tune all", recompute=True))


def test_fewer_gradients_at_once_are_a_remedy(memories: JobMemories) -> None:
    """The most that fit; where they alone do not do, the fewest, with what else helps."""
    wide = JobMemories(lambda: tiny_config("mixtral", num_hidden_layers=4, intermediate_size=1 << 20), SEARCH)
    setup = replace(SPLIT, devices=1)
    needed = [total(wide, "gradients", setup, gradient_memory=most) for most in (8.0, 4.0)]
    (one,) = [one for one in remedies(wide, "gradients", setup, needed[0] - 1) if "gradient_memory" in one.change]
    assert one == Remedy("--model.gradient_memory 4", needed[1])
    fewest = replace(setup, gradient_memory=0.125, recompute=True, cpu_offload=True)
    (together,) = remedies(wide, "gradients", setup, total(wide, "gradients", fewest, windows=2))
    assert together.change == (
        "moe_fsdp's activation_checkpointing and moe_fsdp's cpu_offload and --model.gradient_memory 0.125 and "
        "--data.batch_size 2"
    )


def test_remedies_add_up_where_none_suffices(memories: JobMemories) -> None:
    setup = Setup(2, 1, "ddp", windows=4, seq_len=32, precision="bf16-mixed")
    together = replace(setup, strategy="moe_fsdp", recompute=True)
    (one,) = remedies(memories, "tune all", setup, total(memories, "tune all", together))
    assert one.change == "--trainer.strategy moe_fsdp and moe_fsdp's activation_checkpointing"
    (more,) = remedies(memories, "tune all", setup, total(memories, "tune all", together, windows=1, devices=4))
    assert more.change == f"{one.change} and --data.batch_size 1 and 4 devices (1 x 4)"
    assert remedies(memories, "tune all", setup, 1000) == []


def test_packed_experts_are_read_as_they_are(memories: JobMemories) -> None:
    """A layer is whole before it is packed, so reading it takes as much as ever."""
    loading = [memories.estimate("score", replace(SPLIT, quantize=kind)).moments[0] for kind in (None, "nf4")]
    assert [moment.at for moment in loading] == ["loading", "loading"]
    assert loading[0].transient == loading[1].transient
