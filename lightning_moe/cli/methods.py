"""Methods: whatever gives every expert a score, by name; from a criterion on shared statistics to a search."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lightning_moe.cli.job import Job
from lightning_moe.cli.naee import describe_search, drops_of, naee_sets
from lightning_moe.cli.scan import SCAN, scan_experts, scan_scores
from lightning_moe.cli.search import SearchRequest, importance_scores, run_search
from lightning_moe.criteria import Criterion, Direction, criteria
from lightning_moe.errors import InputError, did_you_mean
from lightning_moe.moe.merged_experts import Merge
from lightning_moe.moe.semi_structured import PATTERN, Rule
from lightning_moe.pruning.budget import Scope
from lightning_moe.pruning.clustering import cluster_scores, merge_clusters
from lightning_moe.pruning.layer_drop import layer_scores
from lightning_moe.pruning.merging import merge_dominant
from lightning_moe.pruning.scores import Drops, ExpertScores, score_experts, scores_of_sets
from lightning_moe.search.naee import BEAM, EXACT_SETS
from lightning_moe.search.presets import PRESETS, method_of
from lightning_moe.stats.store import ModelStats

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
    batchwise: bool = False
    """Whether it learns in steps of a batch from each rank, so that more ranks give another result."""
    stable_ranks: bool = True
    """Whether it may look at the stable ranks of the weights, which are dear."""
    gradients: bool = False
    """Whether it looks at gradients, which take passes of their own."""
    per_ratio: bool = False
    """Whether each ratio needs a run of its own; otherwise one result serves all ratios and scopes. In rounds that is
    the share gone after the round."""
    chooses_sets: bool = False
    """Whether it chooses a set of experts for each layer, so that no order over layers can follow."""
    criterion: bool = False
    """Whether it is a criterion, which can be turned round: drop the most in place of the least."""
    drops: Drops = "experts"
    """What goes: experts, or whole layers, which are chosen among all of the model in one cut."""
    merge: MergeRule | None = None
    """What it does with the experts it does not keep; None drops them. It is done in one cut, not in rounds."""
    weights: Rule | None = None
    """Which weights of every expert it sets to zero, two of every four; it scores and drops no experts then."""

    @property
    def one_cut(self) -> str | None:
        """What it does that is done in one cut; None for a method that also works in rounds."""
        if self.merge is not None:
            return "merges experts"
        if self.drops != "experts":
            return "drops whole layers"
        return None if self.weights is None else "sets weights to zero, which tuning would fill again"

    @property
    def file_name(self) -> str:
        return re.sub(r"[^\w.+-]", "-", self.name)

    def key(self, ratio: float, seed: int | None, ranks: int = 1) -> str:
        """The name of one result, fit for a file; equal keys are the same work. ``ranks`` count if ``batchwise``."""
        words = [
            self.file_name,
            *([self.settings] if self.settings else []),
            *([repr(ratio)] if self.per_ratio else []),
            *([f"seed{seed}"] if self.seeded else []),
            *([f"ranks{ranks}"] if self.batchwise and ranks > 1 else []),
        ]
        return "-".join(words)

    def stats(self, job: Job) -> ModelStats:
        """The statistics that it looks at."""
        return job.gradient_stats if self.gradients else job.stats

    @property
    def scope(self) -> Scope | None:
        """The only one that it has an answer for; None where it has for all."""
        if self.drops != "experts":
            return "global"
        return "layer" if self.chooses_sets else None

    def check_scope(self, scope: Scope) -> None:
        """Raise ``InputError`` for a scope that the method has no answer for."""
        if self.scope in (None, scope):
            return
        if self.chooses_sets:
            raise InputError(
                f"--scope {scope}: {self.name} chooses a set of experts for each layer, which is no order over all "
                "layers; give --scope layer."
            )
        raise InputError(f"--scope {scope}: {self.name} drops whole layers, chosen among all; give --scope global.")

    def run(self, job: Job, ratio: float, seed: int | None, folder: Path) -> ExpertScores:
        """Score all experts; of ``ratio`` and ``seed`` it is given what it depends on."""
        return self.scores(job, ratio if self.per_ratio else None, (seed or 0) if self.seeded else 0, folder)


def _of_criterion(criterion: Criterion, direction: Direction | None = None) -> Method:
    """``direction``, where it is given, is part of the name: the one criterion at both ends is two methods then."""
    name = criterion.name if direction is None else f"{criterion.name}-{direction}"

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        return replace(score_experts(method.stats(job), criterion.name, direction, seed), method=name)

    method = Method(
        name,
        criterion.summary,
        scores,
        seeded=criterion.name == "random",
        stable_ranks=criterion.stable_ranks,
        gradients=criterion.gradients,
        criterion=direction is None,
    )
    return method


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


def _of_layers(name: str, summary: str, drops: Literal["layers", "blocks"]) -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        return layer_scores(job.stats, name, drops)

    return Method(name, summary, scores, stable_ranks=False, drops=drops)


def _layer_methods() -> list[Method]:
    return [
        _of_layers(
            "layer-drop",
            "Layer Drop (Expert Trimming): drops the MoE blocks that turn the residual stream least, by cosine.",
            "layers",
        ),
        _of_layers(
            "block-drop",
            "Block Drop (Expert Trimming): the same of whole decoder layers, attention and MoE block.",
            "blocks",
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
        batchwise=True,
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


def _of_rule(rule: Rule, summary: str) -> Method:
    name = f"{PATTERN}-{rule}"

    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        raise InputError(f"{name} sets weights inside of all experts to zero; it gives experts no scores.")

    return Method(name, summary, scores, seeded=rule == "random", needs_text=rule == "wanda", weights=rule)


def _weight_methods() -> list[Method]:
    return [
        _of_rule("random", "Sets two of every four weights of all experts to zero, at random."),
        _of_rule("magnitude", "Sets the two smallest of every four weights of all experts to zero."),
        _of_rule("wanda", "The same by weight times the norm of its inputs (Wanda)."),
    ]


def _of_scan() -> Method:
    def scores(job: Job, ratio: float | None, seed: int, folder: Path) -> ExpertScores:
        found = scan_experts(job.trainer, job.model, job.data, folder)
        return scan_scores(found, job.identity, job.data.text.fingerprint)

    return Method(SCAN, "How much the loss rises without the expert: a forward for each.", scores, needs_text=True)


def methods() -> list[Method]:
    """All methods: criteria, what merges, drops layers or prunes weights, the searches, and those of plugins."""
    return [
        *(_of_criterion(criterion) for criterion in criteria()),
        *_merging_methods(),
        *_layer_methods(),
        *_weight_methods(),
        *(_of_preset(name) for name in PRESETS),
        _of_naee("naee", False),
        _of_naee("naee-progressive", True),
        _of_scan(),
        *_REGISTERED,
    ]


_REGISTERED: list[Method] = []


def register_method(method: Method) -> None:
    """Let all commands know a method of your own. Raises ``InputError`` for a name that is taken."""
    if any(one.name == method.name for one in methods()):
        raise InputError(f"two methods named {method.name!r}; give the second another name.")
    _REGISTERED.append(method)


def get_method(name: str, scopes: Sequence[str] = ()) -> Method:
    """Look up a method, or a criterion's lowest or highest, as ``ean-max``.

    An unknown name is refused with the nearest known one; ``scopes`` are those that the caller lets stand behind it.
    """
    known = {method.name: method for method in methods()}
    if name in known:
        return known[name]
    both_ways = [one for one in criteria() if not known[one.name].seeded]
    turned = {f"{one.name}-{end}": (one, end) for one in both_ways for end in get_args(Direction)}
    if name in turned:
        return _of_criterion(*turned[name])
    base, _, scope = name.partition("@")
    names = [*known, *turned]
    near = did_you_mean(base, [*names, *(f"{one}@{scope}" for one in names for scope in scopes)])
    known_scope = scope in get_args(Scope)
    apart = f" A scope stands behind a name in `compare` alone; give --scope {scope}." if known_scope else ""
    raise InputError(f"Unknown method '{name}'.{near}{apart} Known: {', '.join(sorted(known))}.")
