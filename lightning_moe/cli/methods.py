"""Methods: whatever gives every expert a score, by name; from a criterion on shared statistics to a search."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_moe.cli.request import model_path
from lightning_moe.cli.search import SearchRequest, importance_scores, run_search
from lightning_moe.criteria import Criterion, criteria
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, describe, did_you_mean
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import model_id
from lightning_moe.moe.merged_experts import NO_MERGE, Merge
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.split_tensors import is_sharded
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.clustering import cluster_scores, merge_clusters
from lightning_moe.pruning.merging import merge_dominant
from lightning_moe.pruning.scores import ExpertScores, score_experts
from lightning_moe.search.presets import PRESETS, method_of
from lightning_moe.stats.store import ModelStats


class Job:
    """One model and one calibration text: what methods work from. Each part is made when it is first asked for.

    Args:
        trainer: How and where to run.
        model: The model.
        data: The calibration text.
        observe: Makes, or finds, the statistics of the whole model on that text; told whether with gradients.
        identity: What scores say they were made for; default is the id of the checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MoECausalLM,
        data: TextDataModule,
        observe: Callable[[MoECausalLM, bool], ModelStats],
        identity: str | None = None,
    ) -> None:
        self.trainer, self.data = trainer, data
        self._identity = identity
        self.preparation_seconds = 0.0
        """Spent on loading the model and on the statistics: work that methods share."""
        self._model, self._observe = model, observe
        self._cut = False
        self._stats: ModelStats | None = None
        self._failures: dict[bool, str] = {}

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
        return self._made(self._stats, gradients=False)

    @property
    def gradient_stats(self) -> ModelStats:
        """The same, with gradients: of further passes that are made when they are first asked for."""
        stats = self.stats
        return self._made(stats if stats.has_gradients else None, gradients=True)

    def _made(self, stats: ModelStats | None, gradients: bool) -> ModelStats:
        if gradients in self._failures:
            raise InputError(self._failures[gradients])
        if stats is None:
            with self._preparation():
                try:
                    stats = self._stats = self._observe(self._whole(), gradients)
                except Exception as error:
                    what = "gradients" if gradients else "statistics"
                    self._failures[gradients] = f"the {what} could not be made: {describe(error)}"
                    raise
        return stats

    @contextmanager
    def cut_model(self, keep: Mapping[str, Sequence[int]], merge: Merge = NO_MERGE) -> Iterator[MoECausalLM]:
        """The model with only these experts, in memory; whoever asks for ``model`` next gets a whole one.

        Where it is split over ranks the others are masked, which gives the same; they cannot be merged there.
        """
        model = self.model
        if is_sharded(model.network):
            assert not merge.groups, "refused before the model was split"
            with mask_plan(model.moe_layers, keep):
                yield model
            return
        self._cut = bool(keep)
        keep_experts(model.network, keep, merge)
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


MergeRule = Callable[[ModelStats, Mapping[str, Sequence[int]]], Merge]
"""``(statistics, kept experts) -> merge``: what becomes of the dropped ones."""


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
    gradients: bool = False
    """Whether it looks at gradients, which take passes of their own."""
    per_ratio: bool = False
    """Whether each ratio needs a run of its own; otherwise one result serves all ratios and scopes."""
    criterion: bool = False
    """Whether it is a criterion, which can be turned round: drop the most in place of the least."""
    merge: MergeRule | None = None
    """What it does with the experts it does not keep; None drops them. It is done in one cut, not in rounds."""

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

    def stats(self, job: Job) -> ModelStats:
        """The statistics that it looks at."""
        return job.gradient_stats if self.gradients else job.stats

    def run(self, job: Job, ratio: float, seed: int | None, folder: Path) -> ExpertScores:
        """Score all experts; of ``ratio`` and ``seed`` it is given what it depends on."""
        return self.scores(job, ratio if self.per_ratio else None, (seed or 0) if self.seeded else 0, folder)


def _of_criterion(criterion: Criterion) -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        stats = job.gradient_stats if criterion.gradients else job.stats
        return score_experts(stats, criterion.name, seed=seed)

    return Method(
        criterion.name,
        criterion.summary,
        scores,
        seeded=criterion.name == "random",
        stable_ranks=criterion.stable_ranks,
        gradients=criterion.gradients,
        criterion=True,
    )


def _of_merging(name: str, summary: str, scored: Callable[[ModelStats], ExpertScores], rule: MergeRule) -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        return replace(scored(job.stats), method=name, settings={})  # of its own it has none

    return Method(name, summary, scores, stable_ranks=False, merge=rule)


def _merging_methods() -> list[Method]:
    return [
        _of_merging(
            "m-smoe",
            "M-SMoE: merges each little used expert into the dominant one with the most similar router logits.",
            lambda stats: score_experts(stats, "euf"),
            merge_dominant,
        ),
        _of_merging(
            "s-smoe", "S-SMoE: merges groups of experts that are alike by CKA.", cluster_scores, merge_clusters
        ),
    ]


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


def methods() -> list[Method]:
    """All methods: every criterion, what merges, the searches, and those of plugins."""
    return [
        *(_of_criterion(criterion) for criterion in criteria()),
        *_merging_methods(),
        *(_of_preset(name) for name in PRESETS),
        *_REGISTERED,
    ]


_REGISTERED: list[Method] = []


def register_method(method: Method) -> None:
    """Let all commands know a method of your own. Raises ``InputError`` for a name that is taken."""
    if any(one.name == method.name for one in methods()):
        raise InputError(f"two methods named {method.name!r}; give the second another name.")
    _REGISTERED.append(method)


def get_method(name: str) -> Method:
    """Look up a method; an unknown name is refused with the nearest known one."""
    known = {method.name: method for method in methods()}
    if name not in known:
        raise InputError(f"Unknown method '{name}'.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}.")
    return known[name]
