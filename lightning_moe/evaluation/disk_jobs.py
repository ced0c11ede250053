"""Jobs from file to file: what cutting a checkpoint, or setting weights in it to zero, takes without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_moe.evaluation.device import READING
from lightning_moe.moe.live_bytes import LiveBytes, imagined
from lightning_moe.moe.semi_structured import Matrix, Pattern, zero_in_matrix
from lightning_moe.moe.weight_shards import SHARD_BYTES
from lightning_moe.moe.weights import Weight

CHOOSING = 80e6
"""Weights of which one core finds two of every four in a second: 70 to 110 million were measured."""


@dataclass(frozen=True)
class DiskJob:
    """What one process takes; devices take nothing."""

    host: int
    """Bytes of the CPU's memory."""
    seconds: float


def cutting(weights: Sequence[Weight], ratio: float, dtype: torch.dtype) -> DiskJob:
    """One cut of a checkpoint that is stored in ``dtype``: at most a file's worth in memory, read and written once."""
    kept = sum(weight.numel * (1 - ratio * weight.stack) for weight in weights) * dtype.itemsize
    return DiskJob(min(int(kept), SHARD_BYTES), 2 * kept / READING)


def thinning(weights: Sequence[Weight], dtype: torch.dtype) -> DiskJob:
    """Half of the experts' weights set to zero, by ``2:4-random``, ``2:4-magnitude``, or ``2:4-wanda`` after its pass.

    In memory are the experts of the file at hand, beside the next tensor where they do not all go into one, and what
    the choice in one matrix takes; the rest is copied from file to file.
    """
    stacks = [weight for weight in weights if weight.stack]
    experts, largest = sum(stack.numel for stack in stacks) * dtype.itemsize, 0
    for stack in stacks:
        one_by_one = stack.made is not None
        largest = max(largest, (_matrix(stack)[0] * _matrix(stack)[1] if one_by_one else stack.numel) * dtype.itemsize)
    held = min(experts, SHARD_BYTES + largest)
    most = max({_matrix(stack) for stack in stacks}, key=lambda shape: shape[0] * shape[1])
    seconds = 2 * sum(weight.numel for weight in weights) * dtype.itemsize / READING
    return DiskJob(held + choice_bytes(most, dtype), seconds + experts / dtype.itemsize / CHOOSING)


def choice_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """What choosing weights in one matrix makes on the way, beside the matrix; Wanda's choice takes most."""
    with imagined():
        weight_OI, norm_EI = torch.empty(shape, dtype=dtype), torch.empty(1, shape[1])
        with LiveBytes([weight_OI, norm_EI]) as live:
            zero_in_matrix(weight_OI, Matrix("", "", 0, 0), Pattern("wanda", norms={"": {"": norm_EI}}))
    return int(live.peak)


def _matrix(stack: Weight) -> tuple[int, int]:
    """One matrix of one expert, of which some stacks hold two."""
    _, outputs, inputs = stack.shape
    return (outputs // 2 if "gate_up" in stack.name else outputs), inputs
