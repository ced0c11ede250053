"""Devices: found by the names that drivers give them, and how long jobs take on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.evaluation.device import BETWEEN_NODES, GPUS, Device, GiB, known_gpu, measured_speed, this_cpu
from lightning_moe.evaluation.job_memory import JOBS, Setup
from lightning_moe.evaluation.job_time import job_time
from lightning_moe.moe.weights import Weight


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("a100", "A100-40GB"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GB200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        *((gpu.name, gpu.name) for gpu in GPUS),
    ],
)
def test_gpus_by_name(name: str, known: str) -> None:
    assert known_gpu(name).name == known


@pytest.mark.parametrize(
    "name", ["H101", "H1000", "H1", "XH100", "A1000", "NVIDIA RTX A1000", "NVIDIA L40", "T400", "RTX", "", "80GB"]
)
def test_unknown_gpus_are_refused(name: str) -> None:
    """Also where a known name is a part of theirs: only a whole word tells."""
    with pytest.raises(InputError, match=rf"^--gpu {name}: not known\. Known: B200, .*H100.*--device_memory"):
        known_gpu(name)


def test_a_cpu_is_shared_and_measured() -> None:
    one, four = this_cpu(1), this_cpu(4)
    assert one.memory // 4 == four.memory and not one.gpu
    assert 1e8 < measured_speed(64, 0.02) < 1e14


WEIGHTS = [
    Weight("embedding", None, (100, 10), torch.float32, looked_up=True),
    Weight("head", None, (100, 10), torch.float32),
]
WEIGHTS += [Weight("experts", 0, (4, 10, 100), torch.float32, routed=0.25, stack=True)]
DEVICE = Device("some", GiB, half=4e3, single=1e3, link=1e3)


def test_time_of_computing() -> None:
    """At work are 1000 of the head and 1000 of the experts, of which each takes 2, 4 or 6 operations a token."""
    expected = {"score": 2, "search": 6, "evaluate": 2, "tune all": 6, "tune routers+norms": 4, "tune routers": 4}
    for job in JOBS:
        found = job_time(WEIGHTS, job, Setup(), DEVICE, tokens=10)
        assert found is not None and found.moving == 0
        assert found.seconds == 2000 * expected[job] * 10 / 1e3
        two = job_time(WEIGHTS, job, Setup(2, strategy="ddp"), DEVICE, tokens=10)
        assert two is not None and two.seconds == found.seconds / 2
    again = job_time(WEIGHTS, "tune all", Setup(recompute=True), DEVICE, tokens=10)
    assert again is not None and again.seconds == 2000 * 8 * 10 / 1e3


def test_time_in_16_bits() -> None:
    """Experts that nobody gathers in 16 bits compute in the type of their weights, autocast or not."""
    mixed = Setup(precision="bf16-mixed", windows=1, seq_len=10)
    for setup, speed in (
        (mixed, 1e3),
        (replace(mixed, strategy="moe_fsdp"), 4e3),
        (replace(mixed, dtype=torch.bfloat16), 4e3),
    ):
        found = job_time(WEIGHTS, "score", setup, DEVICE, tokens=10)
        assert found is not None and found.computing == 2000 * 2 * 10 / speed


def test_time_of_moving() -> None:
    """Of 6000 numbers in float32 half comes from elsewhere: in a step of tuning twice, and once reduced."""
    setup = Setup(2, 1, "moe_fsdp", windows=1, seq_len=10)
    found = job_time(WEIGHTS, "tune all", setup, DEVICE, tokens=40)
    assert found is not None and found.moving == 2 * 3 * 6000 * 4 / 2 / 1e3
    nodes = job_time(
        WEIGHTS, "tune all", Setup(1, 2, "moe_fsdp", windows=1, seq_len=10), replace(DEVICE, link=1e12), 40
    )
    assert nodes is not None and nodes.moving == 2 * 3 * 6000 * 4 / 2 / BETWEEN_NODES
    assert found.seconds == max(found.moving, found.computing)


def test_unknown_speed_has_no_time() -> None:
    assert job_time(WEIGHTS, "score", Setup(), Device("some", GiB), 10) is None
