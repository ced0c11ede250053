"""Cluster: devices named by options of the Trainer, none of which is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_moe.cli.cluster import OPTIONS, Cluster
from lightning_moe.errors import InputError
from lightning_moe.strategies import MoEFSDPStrategy

DEFAULTS = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": None}


def take(**options: Any) -> Cluster:
    return Cluster.take(DEFAULTS | options)


@pytest.mark.parametrize(
    ("devices", "count"), [(8, 8), ("8", 8), ([0, 3], 2), ("0,3", 2), ("1,", 1), ("auto", 1), (-1, 1), ("-1", 1)]
)
def test_devices_in_all_spellings(devices: Any, count: int) -> None:
    assert take(devices=devices, accelerator="cpu").devices == count


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({}, "one device"),
        ({"devices": 2}, "ddp"),
        ({"num_nodes": 2}, "ddp"),
        ({"devices": 2, "strategy": "ddp_find_unused_parameters_true"}, "ddp"),
        ({"strategy": "moe_fsdp"}, "moe_fsdp"),
        ({"devices": 4, "strategy": MoEFSDPStrategy(replicas=2)}, "moe_fsdp"),
    ],
)
def test_strategies(options: dict[str, Any], strategy: str) -> None:
    cluster = take(**options)
    assert cluster.strategy == strategy and (cluster.split is not None) == (strategy == "moe_fsdp")


@pytest.mark.parametrize(("asked", "precision"), [(None, "32-true"), (32, "32-true"), ("bf16", "bf16-mixed")])
def test_precisions_have_other_names(asked: Any, precision: str) -> None:
    assert take(precision=asked).precision == precision


def test_the_trainer_is_left_one_cpu() -> None:
    settings: dict[str, Any] = DEFAULTS | {"devices": 8, "num_nodes": 2, "max_steps": 3}
    assert Cluster.take(settings).ranks == 16
    assert settings == {"accelerator": "cpu", "devices": 1, "max_steps": 3}
    assert set(OPTIONS) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": 0}, "--trainer.devices 0: at least 1"),
        ({"devices": "a few"}, "a number of devices"),
        ({"num_nodes": -1}, "--trainer.num_nodes -1: at least 1"),
        ({"accelerator": "tpu"}, "auto, cpu and gpu"),
        ({"strategy": "fsdp"}, "--trainer.strategy fsdp: a plan knows auto, ddp and moe_fsdp"),
        ({"strategy": "deepspeed_stage_3"}, "a plan knows"),
        ({"precision": "64-true"}, "--trainer.precision 64-true: a plan knows 32-true"),
        ({"strategy": "moe_fsdp", "precision": "16-mixed"}, "moe_fsdp works in 32-true, bf16-mixed, bf16-true"),
        ({"strategy": MoEFSDPStrategy(replicas=3), "devices": 4}, "4 ranks are not divisible into 3 replicas"),
    ],
)
def test_what_a_plan_does_not_know_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        take(**options)
    assert says in str(error.value) and "\n" not in str(error.value)
