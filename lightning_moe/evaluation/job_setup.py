"""Jobs: what the commands do, told apart by what lives in them; and how and where they are to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lightning_moe.callbacks.router_rebalance import Trained
from lightning_moe.errors import InputError
from lightning_moe.evaluation.gathering import Layout
from lightning_moe.moe.quantisation import Quantisation
from lightning_moe.stats.gradients import GRADIENT_MEMORY

Job = Literal[
    "score",
    "gradients",
    "scan",
    "2:4-wanda",
    "search",
    "evaluate",
    "tune all",
    "tune routers+norms",
    "tune routers",
]
"""``gradients``: the passes that criteria on gradients take beside those of ``score``. ``2:4-wanda``: its pass for the
norms of inputs."""

JOBS: tuple[Job, ...] = get_args(Job)

FORWARD: frozenset[Job] = frozenset(("score", "scan", "2:4-wanda", "evaluate"))
"""Jobs that go forward only."""

TRAINED: dict[Job, Trained] = {
    "tune all": "all",
    "tune routers+norms": "routers+norms",
    "tune routers": "routers",
}

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "bf16-mixed": (torch.bfloat16, None),
    "16-mixed": (torch.float16, None),
    "bf16-true": (None, torch.bfloat16),
    "16-true": (None, torch.float16),
}
"""Precisions of the Trainer: the type it computes in, and the one it converts weights to, where it says so."""


@dataclass(frozen=True)
class Setup:
    """How and where jobs run.

    Args:
        devices: On each node.
        nodes: How many.
        strategy: One device; DDP; or moe_fsdp, with its arguments ``replicas``, ``cpu_offload`` and ``quantize``.
        replicas: Copies of the model.
        recompute: Activation checkpointing.
        cpu_offload: Whether GPUs leave what is split in the CPU's memory.
        quantize: How experts are packed in jobs that neither tune nor take gradients of them.
        gpu: Whether the devices are GPUs.
        precision: Of the Trainer.
        dtype: Of the weights as they are loaded, but for tuning.
        tuned_dtype: Of the weights as they are loaded to be tuned.
        windows: Per batch and rank.
        seq_len: Tokens per window.
        ratio: Share of the experts that are gone when the model is tuned.
        gradient_memory: GiB of sums that ``gradients`` may hold on a rank.
    """

    devices: int = 1
    nodes: int = 1
    strategy: Literal["one device", "ddp", "moe_fsdp"] = "one device"
    replicas: int = 1
    recompute: bool = False
    cpu_offload: bool = False
    quantize: Quantisation | None = None
    gpu: bool = False
    precision: str = "32-true"
    dtype: torch.dtype = torch.float32
    tuned_dtype: torch.dtype = torch.float32
    windows: int = 8
    seq_len: int = 2048
    ratio: float = 0.5
    gradient_memory: float = GRADIENT_MEMORY

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def computed(self) -> torch.dtype | None:
        """The type that autocast computes in."""
        return PRECISIONS[self.precision][0]

    def stored(self, job: Job) -> torch.dtype:
        """The type of the weights while a job runs."""
        return PRECISIONS[self.precision][1] or (self.tuned_dtype if tunes(job) else self.dtype)

    @property
    def layout(self) -> Layout:
        if self.strategy != "moe_fsdp":
            return Layout(buckets=self.strategy == "ddp", gpu=self.gpu)
        offload = self.cpu_offload and self.gpu
        return Layout(self.ranks // self.replicas, True, self.computed, offload=offload, gpu=self.gpu)

    def refuse(self, job: Job) -> None:
        """Raise ``InputError`` for what the job will not do."""
        if job == "gradients" and self.quantize is not None:
            raise InputError("packed experts have no gradients; leave quantize out.")
        if not tunes(job):
            return
        if self.precision.endswith("-true") and not self.precision.startswith("32"):
            raise InputError(f"small steps vanish in {self.precision}; give bf16-mixed.")
        if self.quantize is not None:
            raise InputError("tuning changes what quantize packs; leave quantize out.")
        if self.tuned_dtype.itemsize < 4 and (job == "tune all" or self.precision != "bf16-mixed"):
            raise InputError(
                "small steps vanish in 16 bits; leave --model.dtype out, or tune routers and norms in bf16-mixed."
            )


def tunes(job: Job) -> bool:
    return job.startswith("tune")
