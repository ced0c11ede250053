"""What each job takes on a rank: the commands, told apart by what lives in them."""

# E experts, H model width, K experts per token

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from lightning_moe.callbacks.router_rebalance import Trained
from lightning_moe.errors import InputError
from lightning_moe.evaluation.imagined_steps import Batch, ImaginedModel
from lightning_moe.evaluation.rank_memory import Layout, Moment, RankMemory
from lightning_moe.moe.layer_passages import StepBytes
from lightning_moe.moe.quantisation import BLOCKS, Quantisation
from lightning_moe.moe.weights import Weight
from lightning_moe.pruning.budget import blank_scores, make_plan
from lightning_moe.stats.minibatch_cka import CHUNK_VALUES, PER_EXPERT

Job = Literal["score", "search", "evaluate", "tune all", "tune routers+norms", "tune routers"]
JOBS: tuple[Job, ...] = get_args(Job)

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
        quantize: How experts are packed in ``score``, ``search`` and ``evaluate``.
        gpu: Whether the devices are GPUs.
        precision: Of the Trainer.
        dtype: Of the weights as they are loaded, but for tuning.
        tuned_dtype: Of the weights as they are loaded to be tuned.
        windows: Per batch and rank.
        seq_len: Tokens per window.
        ratio: Share of the experts that are gone when the model is tuned.
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


@dataclass(frozen=True)
class JobMemory:
    """What a job takes on the rank that holds most."""

    job: Job
    moments: tuple[Moment, ...]
    host: int = 0
    """Bytes of the CPU's memory besides, where the rank computes on a GPU."""

    @property
    def fullest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)


class JobMemories:
    """Estimates of all jobs on one model; what several have in common is worked out once.

    Args:
        make_config: Makes the model's config, anew each time.
        search: Arguments of the search.
    """

    def __init__(self, make_config: Callable[[], Any], search: dict[str, Any]) -> None:
        self._make_config, self._search = make_config, search
        self._models: dict[Any, ImaginedModel] = {}
        self._traces: dict[Any, Any] = {}
        self.whole = ImaginedModel(make_config(), torch.float32)
        """The model with all its experts."""

    def keep(self, ratio: float) -> dict[str, list[int]]:
        """The experts that stay; raises ``InputError`` for a ratio that cannot be, but 0 is fine here."""
        if ratio == 0:
            return {}
        return make_plan(blank_scores([layer.shape for layer in self.whole.moe_layers]), ratio, "layer").keep

    def estimate(self, job: Job, setup: Setup) -> JobMemory:
        """Raises ``InputError`` for what the job refuses."""
        setup.refuse(job)
        model, learns = self._model(job, setup)
        batch = Batch(setup.windows, setup.seq_len, setup.computed, setup.recompute and not _only_forward(job))
        place = (id(model), job, batch)
        if place not in self._traces:
            self._traces[place] = self._trace(model, job, batch)
        passes, statistics, figures = self._traces[place]
        statistics += 0 if setup.quantize is None else self._scales(setup.quantize)
        memory = RankMemory(model.weights, setup.layout, learns, statistics, self.weights(job, setup))
        moments = [memory.loading()]
        for number, step in enumerate(passes):
            names = ("",) if len(passes) == 1 else ("teacher", "student")
            moments += memory.moments(step, not _only_forward(job) and number == len(passes) - 1, names[number])
        if job == "score":
            moments += [memory.observing(*self._observed(passes[0], batch)), memory.figures(figures)]
        if tunes(job):
            moments.append(memory.saving())
        return JobMemory(job, tuple(moments), memory.host_bytes)

    def weights(self, job: Job, setup: Setup) -> list[Weight]:
        """The weights that work in a job, not packed."""
        return self._model(job, replace(setup, quantize=None))[0].weights

    def _model(self, job: Job, setup: Setup) -> tuple[ImaginedModel, frozenset[str]]:
        """The model of a job, and the names of what learns in it.

        Where nothing does, weights could, and autocast keeps copies of those that could until a step is done.
        """
        keep = setup.ratio if tunes(job) else None
        gathered = setup.layout.gathered if setup.layout.split else None
        kind = (setup.stored(job), keep, gathered, setup.quantize)
        if kind not in self._models:
            kept = None if keep is None else self.keep(keep)
            self._models[kind] = ImaginedModel(self._make_config(), kind[0], kept, gathered, setup.quantize)
        learns = self._models[kind].learn(TRAINED.get(job, "all"))
        return self._models[kind], learns if tunes(job) else frozenset()

    def _trace(self, model: ImaginedModel, job: Job, batch: Batch) -> tuple[list[StepBytes], int, int]:
        """Passes of a step; statistics that stay; what figures of the weights take."""
        if job == "score":
            return [model.observe(batch)], model.statistics(), model.weight_figures()
        if job == "evaluate":
            return [model.evaluate(batch)], 0, 0
        return model.search(batch, self._search) if job == "search" else [model.tune(batch)], 0, 0

    def _scales(self, kind: Quantisation) -> int:
        """Scales of packed experts, a float32 for each block, which no rank shares with others."""
        return sum(weight.numel // BLOCKS[kind] * 4 for weight in self.whole.weights if weight.stack)

    def _observed(self, step: StepBytes, batch: Batch) -> tuple[int, int]:
        """Activations while statistics are taken, and what these make on the way.

        The outputs of all experts are there. For the likeness of experts some of them are picked, in float32, and
        laid out by expert and sequence, at most ``CHUNK_VALUES`` at once; see ``pair_hsic``.
        """
        width = self.whole.width
        activations = transient = 0
        for layer in self.whole.moe_layers:
            outputs = batch.tokens * layer.top_k
            rows = min(PER_EXPERT, batch.seq_len) * layer.num_experts
            sequences = max(1, min(batch.windows, CHUNK_VALUES // (rows * width)))
            activations = max(activations, 4 * width * (outputs + 4 * batch.tokens))
            transient = max(transient, 4 * width * (min(outputs, rows * sequences) + rows * sequences))
        return step.entry + activations, transient


def tunes(job: Job) -> bool:
    return job.startswith("tune")


def _only_forward(job: Job) -> bool:
    return job in ("score", "evaluate")
