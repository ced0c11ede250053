"""Cluster: the devices that the Trainer's options name, be they here or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_moe.errors import InputError
from lightning_moe.evaluation.job_setup import PRECISIONS
from lightning_moe.strategies import PRECISIONS as SPLIT_PRECISIONS
from lightning_moe.strategies import MoEFSDPStrategy

ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}
"""Other names of the Trainer for its precisions."""

OPTIONS = ("accelerator", "devices", "num_nodes", "strategy", "precision")
"""Of the Trainer, which a cluster takes out of its settings."""


@dataclass(frozen=True)
class Cluster:
    """Where a job would run, read from options of the Trainer."""

    devices: int
    """On each node."""
    nodes: int
    accelerator: Literal["auto", "cpu", "gpu"]
    strategy: Literal["one device", "ddp", "moe_fsdp"]
    precision: str
    split: MoEFSDPStrategy | None = None
    """The arguments of moe_fsdp, where that is the strategy."""

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @staticmethod
    def take(settings: dict[str, Any]) -> Cluster:
        """Read these options and take them out, so that the Trainer asks for no device. Raises ``InputError``."""
        asked = {name: settings.pop(name, None) for name in OPTIONS}
        settings |= {"accelerator": "cpu", "devices": 1}
        accelerator = _accelerator(asked["accelerator"])
        devices, nodes = _devices(asked["devices"], accelerator), asked["num_nodes"] or 1
        if nodes < 1:
            raise InputError(f"--trainer.num_nodes {nodes}: at least 1.")
        precision = ALIASES.get(str(asked["precision"]), str(asked["precision"]))
        if precision not in PRECISIONS:
            raise InputError(f"--trainer.precision {precision}: a plan knows {', '.join(PRECISIONS)}.")
        strategy = _split(asked["strategy"])
        if strategy is None:
            kind: Literal["one device", "ddp"] = "ddp" if devices * nodes > 1 else "one device"
            return Cluster(devices, nodes, accelerator, kind, precision)
        if precision not in SPLIT_PRECISIONS:
            raise InputError(f"--trainer.precision {precision}: moe_fsdp works in {', '.join(SPLIT_PRECISIONS)}.")
        if devices * nodes % strategy.replicas:
            raise InputError(f"moe_fsdp: {devices * nodes} ranks are not divisible into {strategy.replicas} replicas.")
        return Cluster(devices, nodes, accelerator, "moe_fsdp", precision, strategy)


def _accelerator(asked: Any) -> Literal["auto", "cpu", "gpu"]:
    known: dict[Any, Literal["auto", "cpu", "gpu"]] = {None: "auto", "auto": "auto", "cpu": "cpu", "gpu": "gpu"}
    accelerator = (known | {"cuda": "gpu"}).get(asked)
    if accelerator is None:
        raise InputError(f"--trainer.accelerator {asked}: a plan knows auto, cpu and gpu.")
    return accelerator


def _devices(asked: Any, accelerator: str) -> int:
    """How many of them; where that is left to the machine, those that are here."""
    here = torch.cuda.device_count() if accelerator != "cpu" else 0
    if asked in (None, "auto", -1, "-1"):
        return max(1, here)
    if isinstance(asked, str):
        words = [word for word in asked.split(",") if word]
        if not all(word.strip().isdecimal() for word in words):
            raise InputError(f"--trainer.devices {asked}: a number of devices, or a list of their numbers.")
        count = len(words) if "," in asked else int(asked)
    else:
        count = len(asked) if isinstance(asked, list | tuple) else int(asked)
    if count < 1:
        raise InputError(f"--trainer.devices {asked}: at least 1.")
    return count


def _split(strategy: Any) -> MoEFSDPStrategy | None:
    """moe_fsdp, where it is that; None for DDP, and where the Trainer would choose."""
    if isinstance(strategy, MoEFSDPStrategy):
        return strategy
    if strategy == "moe_fsdp":
        return MoEFSDPStrategy()
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if strategy is None or isinstance(strategy, DDPStrategy) or name == "auto" or name.startswith("ddp"):
        return None
    raise InputError(f"--trainer.strategy {name}: a plan knows auto, ddp and moe_fsdp.")
