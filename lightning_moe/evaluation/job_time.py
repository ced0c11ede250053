"""How long a job computes, roughly: operations of the parameters at work, and the gathering of split weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_moe.evaluation.device import BETWEEN_NODES, Device
from lightning_moe.evaluation.gathering import REDUCED_BYTES
from lightning_moe.evaluation.job_passages import passages
from lightning_moe.evaluation.job_setup import Job, Setup
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.weights import Weight


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


def job_time(
    weights: Sequence[Weight], shapes: Sequence[LayerShape], job: Job, setup: Setup, device: Device, tokens: float
) -> JobTime | None:
    """How long a job takes for so many tokens over all ranks; None where the device's speed is not known.

    For each parameter at work and token there are 2 operations in a forward, 2 back through the activations, 2 for the
    gradient of the weight; recomputing takes those of the forward once more. A split model's weights are gathered for
    each forward and backward, and their gradients are reduced. Left out: what attention does beside its weights,
    statistics, loading, saving.
    """
    layout, stored = setup.layout, setup.stored(job)
    # Outside of moe_fsdp autocast does not reach the products of experts.
    in_half = ((layout.gathered or stored) if layout.split else stored).itemsize == 2
    speed = device.half if in_half else device.single
    if speed is None:
        return None
    step = passages(job, setup, weights, shapes)
    operations = moved = 0.0
    for weight in weights:
        times = step(weight)
        if not weight.looked_up:
            recomputed = times.backward if setup.recompute else 0
            at_work = weight.numel * weight.routed
            operations += 2 * at_work * (times.forward + times.backward + times.gradients + recomputed)
        if weight.split:
            gathered = (times.forward + times.backward) * layout.itemsize(weight)
            moved += weight.numel * (gathered + times.gradients * REDUCED_BYTES)
    computing = operations * tokens / (setup.ranks * speed)
    if not layout.split or layout.ranks == 1:
        return JobTime(computing, 0.0)
    steps = math.ceil(tokens / (setup.ranks * setup.windows * setup.seq_len))
    link = min(device.link, BETWEEN_NODES) if layout.ranks > setup.devices else device.link
    return JobTime(computing, steps * moved * (1 - 1 / layout.ranks) / link)
