"""Methods: whatever gives every expert a score, by name; from a criterion on shared statistics to a search."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_moe.cli.naee import describe_search, drops_of, naee_sets
from lightning_moe.cli.request import model_path
from lightning_moe.cli.search import SearchRequest, importance_scores, run_search
from lightning_moe.criteria import Criterion, criteria
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, describe, did_you_mean
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import model_id
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.split_tensors import is_sharded
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.budget import Scope
from lightning_moe.pruning.scores import ExpertScores, score_experts, scores_of_sets
from lightning_moe.search.naee import BEAM, EXACT_SETS
from lightning_moe.search.presets import PRESETS, method_of
from lightning_moe.stats.store import ModelStats


class Job:
    """One model and one calibration text: what methods work from. Each part is made when it is first asked for.

    Args:
        trainer: How and where to run.
        model: The model.
        data: The calibration text.
        observe: Makes, or finds, the statistics of the whole model on that text.
        identity: What scores say they were made for; default is the id of the checkpoint.
        whole: The layers before any round of pruning, of which a ratio is a share; default is as they are.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MoECausalLM,
        data: TextDataModule,
        observe: Callable[[MoECausalLM], ModelStats],
        identity: str | None = None,
        whole: Sequence[LayerShape] | None = None,
    ) -> None:
        self.trainer, self.data, self.whole = trainer, data, whole
        self._identity = identity
        self.preparation_seconds = 0.0
        """Spent on loading the model and on the statistics: work that methods share."""
        self._model, self._observe = model, observe
        self._cut = False
        self._stats: ModelStats | None = None
        self._failure: str | None = None

    @property
    def identity(self) -> str:
        return self._identity or model_id(model_path(self._model))

    @property
    def model(self) -> MoECausalLM:
        """The model with all its experts, loaded."""
        with self._preparation():
            self._whole().prepare(self.trainer)
        return self._model

    @property
    def stats(self) -> ModelStats:
        """The statistics of the model on the calibration text. A pass that failed is not made again."""
        if self._failure is not None:
            raise InputError(self._failure)
        if self._stats is None:
            with self._preparation():
                try:
                    self._stats = self._observe(self._whole())
                except Exception as error:
                    self._failure = f"the statistics could not be made: {describe(error)}"
                    raise
        return self._stats

    @contextmanager
    def cut_model(self, keep: Mapping[str, Sequence[int]]) -> Iterator[MoECausalLM]:
        """The model with only these experts, in memory; whoever asks for ``model`` next gets a whole one.

        Where it is split over ranks the others are masked, which gives the same.
        """
        model = self.model
        if is_sharded(model.network):
            with mask_plan(model.moe_layers, keep):
                yield model
            return
        self._cut = bool(keep)
        keep_experts(model.network, keep)
        yield model

    def whole_model_to_change(self) -> MoECausalLM:
        """The model with all its experts, loaded, to do with as one likes; whoever asks next gets another."""
        model = self.model
        self._cut = True
        return model

    def _whole(self) -> MoECausalLM:
        """The model, loaded or not, but not one that was cut."""
        if self._cut:
            self._model.release()
            self._cut = False
        return self._model

    @contextmanager
    def _preparation(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.preparation_seconds += time.perf_counter() - start


Scoring = Callable[[Job, float | None, int, Path], ExpertScores]
"""``(job, ratio, seed, folder) -> scores``; ``folder`` is its own, for unfinished work, removed when it succeeds."""


@dataclass(frozen=True)
class Method:
    """A named way to score experts."""

    name: str
    summary: str
    scores: Scoring
    """``ratio`` is None unless the method is ``per_ratio``."""
    seeded: bool = False
    """Whether another seed gives another result."""
    settings: str = ""
    """Stands for whatever else decides the result; part of ``key``."""
    needs_text: bool = False
    """Whether it works on the text itself; otherwise statistics of it will do."""
    stable_ranks: bool = True
    """Whether it may look at the stable ranks of the weights, which are dear."""
    per_ratio: bool = False
    """Whether each ratio needs a run of its own; otherwise one result serves all ratios and scopes. In rounds that is
    the share gone after the round."""
    chooses_sets: bool = False
    """Whether it chooses a set of experts for each layer, so that no order over layers can follow."""

    @property
    def file_name(self) -> str:
        return re.sub(r"[^\w.+-]", "-", self.name)

    def key(self, ratio: float, seed: int | None) -> str:
        """The name of one result, fit for a file: equal keys are the same work."""
        words = [
            self.file_name,
            *([self.settings] if self.settings else []),
            *([repr(ratio)] if self.per_ratio else []),
            *([f"seed{seed}"] if self.seeded else []),
        ]
        return "-".join(words)

    def check_scope(self, scope: Scope) -> None:
        """Raise ``InputError`` for a scope that the method has no answer for."""
        if self.chooses_sets and scope != "layer":
            raise InputError(
                f"--scope {scope}: {self.name} chooses a set of experts for each layer, which is no order over all "
                "layers; give --scope layer."
            )

    def run(self, job: Job, ratio: float, seed: int | None, folder: Path) -> ExpertScores:
        """Score all experts; of ``ratio`` and ``seed`` it is given what it depends on."""
        return self.scores(job, ratio if self.per_ratio else None, (seed or 0) if self.seeded else 0, folder)


def _of_criterion(criterion: Criterion) -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        return score_experts(job.stats, criterion.name, seed=seed)

    seeded = criterion.name == "random"
    return Method(criterion.name, criterion.summary, scores, seeded, stable_ranks=criterion.stable_ranks)


def _of_preset(preset_name: str) -> Method:
    name = method_of(preset_name)

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        module = run_search(job.trainer, job.model, job.data, PRESETS[preset_name], seed, folder)
        return importance_scores(module, job.identity, job.data.text.fingerprint, name)

    arguments = SearchRequest(0.5, preset=preset_name).arguments
    return Method(
        name,
        f"Gradient search (DiEP), preset {preset_name}.",
        scores,
        seeded=True,
        settings=hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8],
        needs_text=True,
    )


def _of_naee(name: str, progressive: bool) -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        assert ratio is not None
        model = job.model
        shapes = [layer.shape for layer in model.moe_layers]
        drops = drops_of(shapes, ratio, job.whole)
        how = describe_search(shapes, drops)
        if job.trainer.is_global_zero:
            print(f"{name}: {how}.")
        chosen = naee_sets(job.trainer, model, job.data, drops, folder, progressive)
        settings = {"search": how, "errors": {layer: found.error for layer, found in chosen.items()}}
        keep = {layer: found.keep for layer, found in chosen.items()}
        return scores_of_sets(job.identity, job.data.text.fingerprint, name, shapes, keep, ratio, settings)

    inputs = "of the model with the layers before cut already" if progressive else "of the full model"
    return Method(
        name,
        f"Search over sets of experts (NAEE), by how far each layer's output moves on inputs {inputs}.",
        scores,
        settings=f"sets{EXACT_SETS}-beam{BEAM}",
        needs_text=True,
        per_ratio=True,
        chooses_sets=True,
    )


def methods() -> list[Method]:
    """All methods: every criterion, and the searches."""
    searches = [_of_preset(name) for name in PRESETS]
    searches += [_of_naee("naee", False), _of_naee("naee-progressive", True)]
    return [_of_criterion(criterion) for criterion in criteria()] + searches


def get_method(name: str) -> Method:
    """Look up a method; an unknown name is refused with the nearest known one."""
    known = {method.name: method for method in methods()}
    if name not in known:
        raise InputError(f"Unknown method '{name}'.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    return known[name]
