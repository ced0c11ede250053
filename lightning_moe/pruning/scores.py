"""ExpertScores: how much each expert matters, and how that was found."""

# E experts

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_moe.criteria import Direction, criteria, get_criterion
from lightning_moe.errors import InputError, first_line
from lightning_moe.files import write_json
from lightning_moe.moe.checkpoints import same_model
from lightning_moe.moe.layers import LayerShape
from lightning_moe.stats.store import ModelStats

VERSION = 1

Drops = Literal["experts", "layers", "blocks"]


@dataclass(frozen=True)
class ExpertScores:
    """Scores per layer, ``(E,)`` float64, higher means keep."""

    model_id: str
    data_fingerprint: str
    method: str
    shapes: Sequence[LayerShape]
    scores: dict[str, Tensor]
    comparable: bool = True
    """False when a score is an order within its layer, so that comparing layers says nothing."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How they were made: direction, seed. ``for_ratio``, where there is one, is the only ratio that they serve, under
    scope layer alone. ``drops``, where there is one, says that they are of whole layers."""

    @property
    def drops(self) -> Drops:
        """What they choose among: experts; MoE blocks (``layers``); decoder layers with one (``blocks``)."""
        drops: Drops = self.settings.get("drops", "experts")
        return drops

    @property
    def fingerprint(self) -> str:
        """Of the scores and how they were made."""
        return hashlib.sha256(json.dumps(self.as_json()).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            **self.settings,
            "comparable_across_layers": self.comparable,
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }

    @classmethod
    def from_json(
        cls, value: Mapping[str, Any], shapes: Sequence[LayerShape], model_id: str, data_fingerprint: str
    ) -> ExpertScores:
        """What ``as_json`` gave, with what it leaves out."""
        rest = dict(value)
        method, comparable = rest.pop("method"), rest.pop("comparable_across_layers")
        scores = {name: torch.tensor(row, dtype=torch.float64) for name, row in rest.pop("scores").items()}
        return cls(model_id, data_fingerprint, method, shapes, scores, comparable, rest)


def score_experts(stats: ModelStats, method: str, direction: Direction | None = None, seed: int = 0) -> ExpertScores:
    """Score all experts of all layers by one criterion."""
    criterion = get_criterion(method)
    return ExpertScores(
        stats.model_id,
        stats.data_fingerprint,
        method,
        [layer.shape for layer in stats.layers],
        {layer.shape.name: criterion.scores(layer, direction, seed) for layer in stats.layers},
        criterion.comparable,
        {"direction": direction or criterion.direction} | ({"seed": seed} if method == "random" else {}),
    )


def score_by_all(stats: ModelStats, seed: int = 0) -> list[ExpertScores]:
    """Score all experts by every criterion, each in its paper's direction; by those on gradients if there are any."""
    there = (one for one in criteria() if stats.has_gradients or not one.gradients)
    return [score_experts(stats, criterion.name, seed=seed) for criterion in there]


def scores_of_sets(
    model_id: str,
    data_fingerprint: str,
    method: str,
    shapes: Sequence[LayerShape],
    keep: Mapping[str, Sequence[int]],
    ratio: float,
    settings: Mapping[str, Any],
) -> ExpertScores:
    """Scores by which scope layer keeps exactly these sets at ``ratio``: 1 for what stays, 0 for what goes.

    A layer that ``keep`` does not name stays whole.
    """
    scores = {shape.name: torch.zeros(shape.num_experts, dtype=torch.float64) for shape in shapes}
    for shape in shapes:
        scores[shape.name][list(keep.get(shape.name, range(shape.num_experts)))] = 1.0
    return ExpertScores(model_id, data_fingerprint, method, shapes, scores, False, {**settings, "for_ratio": ratio})


def methods_in(file: Path) -> set[str]:
    """The methods whose scores a file holds; none where it is no such file."""
    try:
        return set(json.loads(file.read_text())["methods"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def load_scores(file: Path, method: str | None, shapes: Sequence[LayerShape], model_id: str) -> ExpertScores:
    """Read the scores of one method; with none named, those of reap-sum or else the first in the file.

    ``file`` may be the run folder that holds it. Raises ``InputError`` for what is not there or of another model.
    """
    folder, file = file, file / "scores.json" if file.is_dir() else file
    try:
        value = json.loads(file.read_text())
        found, made_for, fingerprint = value["methods"], value["model_id"], value["data_fingerprint"]
        version = value["version"]
    except FileNotFoundError as error:
        if folder != file and (folder / "stats.safetensors").exists():
            raise InputError(
                f"--scores {folder}: it holds statistics and no scores; give `prune` --stats {folder}."
            ) from error
        raise InputError(f"--scores {file}: no such file; `score` and `search` write one.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--scores {file}: not a file of scores ({first_line(error)}).") from error
    if version != VERSION:
        raise InputError(f"--scores {file}: version {version}, this program reads {VERSION}.")
    if not same_model(made_for, model_id):
        raise InputError(f"--scores {file}: made for model {made_for}, this is {model_id}; score this model first.")
    if method is None:
        method = "reap-sum" if "reap-sum" in found else next(iter(found), "any method")
    if method not in found:
        raise InputError(f"--scores {file}: no scores of {method} in it; it has {', '.join(found) or 'none'}.")
    chosen = found[method]
    scores = ExpertScores.from_json(chosen, shapes, made_for, fingerprint)
    for shape in shapes:
        have = len(scores.scores.get(shape.name, ()))
        if have != shape.num_experts:
            raise InputError(f"--scores {file}: {have} scores for {shape.name}, which has {shape.num_experts} experts.")
    return scores


def write_scores(file: Path, scores: Sequence[ExpertScores]) -> None:
    """Write the scores of one or several methods on the same statistics."""
    write_json(
        file,
        {
            "version": VERSION,
            "model_id": scores[0].model_id,
            "data_fingerprint": scores[0].data_fingerprint,
            "methods": {one.method: one.as_json() for one in scores},
        },
    )
