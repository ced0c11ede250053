"""How long jobs take on a device, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_moe.evaluation.device import BETWEEN_NODES, Device, GiB
from lightning_moe.evaluation.job_setup import JOBS, Job, Setup
from lightning_moe.evaluation.job_time import job_time
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.weights import Weight

WEIGHTS = [
    Weight("embedding", None, (100, 10), torch.float32, looked_up=True),
    Weight("head", None, (100, 10), torch.float32),
]
WEIGHTS += [Weight("experts", 0, (4, 10, 100), torch.float32, routed=0.25, stack=True)]
DEVICE = Device("some", GiB, half=4e3, single=1e3, link=1e3)


def test_time_of_computing() -> None:
    """At work are 1000 of the head and 1000 of the experts, of which each takes 2, 4 or 6 operations a token."""
    expected: dict[Job, int] = {"score": 2, "2:4-wanda": 2, "search": 6, "evaluate": 2}
    expected |= {"tune all": 6, "tune routers+norms": 4, "tune routers": 4}
    assert {*JOBS} - {*expected} == {"gradients", "scan"}
    for job in expected:
        found = job_time(WEIGHTS, [], job, Setup(), DEVICE, tokens=10)
        assert found is not None and found.moving == 0
        assert found.seconds == 2000 * expected[job] * 10 / 1e3
        two = job_time(WEIGHTS, [], job, Setup(2, strategy="ddp"), DEVICE, tokens=10)
        assert two is not None and two.seconds == found.seconds / 2
    again = job_time(WEIGHTS, [], "tune all", Setup(recompute=True), DEVICE, tokens=10)
    assert again is not None and again.seconds == 2000 * 8 * 10 / 1e3


def test_time_of_a_scan() -> None:
    """Once the whole, then for each of 4 experts its layer and the head."""
    found = job_time(WEIGHTS, [LayerShape("", 0, 4, 1)], "scan", Setup(), DEVICE, tokens=10)
    assert found is not None and found.seconds == 2000 * 2 * (1 + 4) * 10 / 1e3


def test_time_of_gradients() -> None:
    """Two layers with experts: in one pass, or one after the other, when the backward of the second ends early."""
    two = [*WEIGHTS, replace(WEIGHTS[-1], layer=1)]
    layer = 4 * 4 * 10 * 100 / (1 << 30)
    once, twice = (
        job_time(two, [], "gradients", Setup(gradient_memory=memory), DEVICE, tokens=10)
        for memory in (2 * layer, layer)
    )
    # Forward, and back through the activations, of 3000; gradients of 2000.
    assert once is not None and once.seconds == 2 * (3000 + 3000 + 2000) * 10 / 1e3
    assert twice is not None and twice.seconds == 2 * (2 * 3000 + 3000 + 2000 + 2000) * 10 / 1e3
    again = job_time(two, [], "gradients", Setup(gradient_memory=layer, recompute=True), DEVICE, tokens=10)
    assert again is not None and again.seconds == twice.seconds + 2 * (3000 + 2000) * 10 / 1e3
    split = Setup(2, 1, "moe_fsdp", windows=1, seq_len=10, gradient_memory=2 * layer)
    moved = job_time(two, [], "gradients", split, DEVICE, tokens=20)
    # Gathered twice, embedding and head too, and the experts' gradients reduced once.
    assert moved is not None and moved.moving == (2 * 10000 + 8000) * 4 / 2 / 1e3


def test_time_in_16_bits() -> None:
    """Experts that nobody gathers in 16 bits compute in the type of their weights, autocast or not."""
    mixed = Setup(precision="bf16-mixed", windows=1, seq_len=10)
    for setup, speed in (
        (mixed, 1e3),
        (replace(mixed, strategy="moe_fsdp"), 4e3),
        (replace(mixed, dtype=torch.bfloat16), 4e3),
    ):
        found = job_time(WEIGHTS, [], "score", setup, DEVICE, tokens=10)
        assert found is not None and found.computing == 2000 * 2 * 10 / speed


def test_time_of_moving() -> None:
    """Of 6000 numbers in float32 half comes from elsewhere: in a step of tuning twice, and once reduced."""
    setup = Setup(2, 1, "moe_fsdp", windows=1, seq_len=10)
    found = job_time(WEIGHTS, [], "tune all", setup, DEVICE, tokens=40)
    assert found is not None and found.moving == 2 * 3 * 6000 * 4 / 2 / 1e3
    nodes = job_time(
        WEIGHTS, [], "tune all", Setup(1, 2, "moe_fsdp", windows=1, seq_len=10), replace(DEVICE, link=1e12), 40
    )
    assert nodes is not None and nodes.moving == 2 * 3 * 6000 * 4 / 2 / BETWEEN_NODES
    assert found.seconds == max(found.moving, found.computing)


def test_unknown_speed_has_no_time() -> None:
    assert job_time(WEIGHTS, [], "score", Setup(), Device("some", GiB), 10) is None
