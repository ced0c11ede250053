"""Devices: found by the names that drivers give them, or measured."""

from __future__ import annotations

import pytest

from lightning_moe.errors import InputError
from lightning_moe.evaluation.device import GPUS, known_gpu, measured_speed, this_cpu


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
