"""What each job takes on a rank: the commands, told apart by what lives in them."""

# E experts, H model width, K experts per token

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_moe.errors import InputError
from lightning_moe.evaluation.imagined_steps import Batch, ImaginedModel
from lightning_moe.evaluation.job_passages import gradient_chunks, scanned_experts
from lightning_moe.evaluation.job_setup import FORWARD, TRAINED, Job, Setup, tunes
from lightning_moe.evaluation.rank_memory import Moment, RankMemory
from lightning_moe.moe.layer_passages import StepBytes
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.quantisation import BLOCKS, Quantisation
from lightning_moe.moe.semi_structured import check_widths
from lightning_moe.moe.weights import Weight
from lightning_moe.pruning.budget import blank_scores, make_plan
from lightning_moe.stats.minibatch_cka import CHUNK_VALUES, PER_EXPERT


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
        return make_plan(blank_scores(self.shapes), ratio, "layer").keep

    @property
    def shapes(self) -> list[LayerShape]:
        """The MoE layers of the whole model."""
        return [layer.shape for layer in self.whole.moe_layers]

    def estimate(self, job: Job, setup: Setup) -> JobMemory:
        """Raises ``InputError`` for what the job refuses."""
        setup.refuse(job)
        self._refuse(job)
        backward = job not in FORWARD
        model, learns = self._model(job, setup)
        batch = Batch(setup.windows, setup.seq_len, setup.computed, setup.recompute and backward)
        chunks = gradient_chunks(self.whole.weights, setup) if job == "gradients" else []
        # The pass of the first chunk holds most activations: it goes back through all layers. Where chunks are unlike,
        # they are counted with the sums of the largest.
        first = frozenset(chunks[0]) if chunks else frozenset()
        place = (id(model), job, batch, first, setup.layout.split)
        if place not in self._traces:
            self._traces[place] = self._trace(model, job, batch, first, setup.layout.split)
        passes, statistics, figures = self._traces[place]
        statistics += 0 if setup.quantize is None else self._scales(setup.quantize)
        sums = max((sum(chunk.values()) for chunk in chunks), default=0)
        on_device, on_host = (0, sums) if setup.layout.offload else (sums, 0)
        summed = frozenset(weight.name for weight in model.weights if weight.stack and weight.layer in first)
        unpacked = self.weights(job, setup)
        memory = RankMemory(model.weights, setup.layout, learns, statistics + on_device, unpacked, summed)
        moments = [memory.loading()]
        for number, step in enumerate(passes):
            names = ("",) if len(passes) == 1 else ("teacher", "student")
            moments += memory.moments(step, backward and number == len(passes) - 1, names[number])
        if job == "score":
            moments += [memory.observing(*self._observed(passes[0], batch)), memory.figures(figures)]
        if tunes(job):
            moments.append(memory.saving())
        return JobMemory(job, tuple(moments), memory.host_bytes + on_host)

    def _refuse(self, job: Job) -> None:
        """Raise ``InputError`` for what the job will not do to this model."""
        if job == "scan" and not scanned_experts(self.shapes, None):
            raise InputError("each layer has as many experts as its router picks, so none can be removed.")
        if job == "2:4-wanda":
            check_widths(self.whole.moe_layers)

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

    def _trace(
        self, model: ImaginedModel, job: Job, batch: Batch, summed: frozenset[int], split: bool
    ) -> tuple[list[StepBytes], int, int]:
        """Passes of a step; statistics that stay; what figures of the weights take."""
        if job == "score":
            return [model.observe(batch)], model.statistics(), model.weight_figures()
        if job == "2:4-wanda":
            return [model.watch(batch)], model.input_sums(), 0
        if job == "scan":
            step = model.evaluate(batch)
            return [replace(step, entry=step.entry + model.recorded(batch))], 0, 0
        if job == "gradients":
            return [model.gradients(batch, summed, whole=split)], 0, 0
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
