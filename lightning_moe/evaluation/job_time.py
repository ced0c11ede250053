"""How long a job computes, roughly: operations of the parameters at work, and the gathering of split weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moe.evaluation.device import BETWEEN_NODES, Device
from lightning_moe.evaluation.job_memory import Job, Setup
from lightning_moe.evaluation.rank_memory import REDUCED_BYTES
from lightning_moe.moe.weights import Weight

OPERATIONS: dict[Job, int] = {
    "score": 2,
    "evaluate": 2,
    "search": 6,
    "tune all": 6,
    "tune routers+norms": 4,
    "tune routers": 4,
}
"""For each parameter at work and token: 2 forward, 2 back through the activations, 2 for gradients of weights. The
search goes forward twice, as teacher and as student, and back through the activations."""

PASSES: dict[Job, tuple[int, int]] = {
    "score": (1, 0),
    "evaluate": (1, 0),
    "search": (3, 0),
    "tune all": (2, 1),
    "tune routers+norms": (2, 0),
    "tune routers": (2, 0),
}
"""How often a step gathers a split model's weights, and how often it reduces their gradients."""


@dataclass(frozen=True)
class JobTime:
    """Seconds of a job, roughly."""

    computing: float
    moving: float
    """That gathering and reducing take by themselves."""

    @property
    def seconds(self) -> float:
        """The longer of the two, which run side by side."""
        return max(self.computing, self.moving)


def job_time(weights: Sequence[Weight], job: Job, setup: Setup, device: Device, tokens: float) -> JobTime | None:
    """How long a job takes for so many tokens over all ranks; None where the device's speed is not known.

    Left out: what attention does beside its weights, statistics, loading, saving.
    """
    layout, stored = setup.layout, setup.stored(job)
    # Outside of moe_fsdp autocast does not reach the products of experts.
    in_half = ((layout.gathered or stored) if layout.split else stored).itemsize == 2
    speed = device.half if in_half else device.single
    if speed is None:
        return None
    at_work = sum(weight.numel * weight.routed for weight in weights if not weight.looked_up)
    recomputing = 2 if setup.recompute and job not in ("score", "evaluate") else 0
    computing = at_work * (OPERATIONS[job] + recomputing) * tokens / (setup.ranks * speed)
    if not layout.split or layout.ranks == 1:
        return JobTime(computing, 0.0)
    gathers, reduces = PASSES[job]
    moved = sum(w.numel * (gathers * layout.itemsize(w) + reduces * REDUCED_BYTES) for w in weights if w.split)
    steps = math.ceil(tokens / (setup.ranks * setup.windows * setup.seq_len))
    link = min(device.link, BETWEEN_NODES) if layout.ranks > setup.devices else device.link
    return JobTime(computing, steps * moved * (1 - 1 / layout.ranks) / link)
