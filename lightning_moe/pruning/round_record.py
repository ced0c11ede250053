"""RoundRecord: what one round of pruning did and measured, a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_moe.errors import InputError, first_line
from lightning_moe.files import replaced_file

VERSION = 1

MOMENTS = ("before_prune", "after_prune", "after_finetune")
"""When perplexity and load are measured; the last only where the model is tuned."""


@dataclass(frozen=True)
class RoundRecord:
    """One round. Experts are named by their ids in the whole model."""

    round: int
    """From 1 on."""
    ratio: float
    """Share of the experts of the whole model that is gone."""
    method: str
    keep: dict[str, list[int]]
    """Kept ids of each layer."""
    dropped: dict[str, list[int]]
    """Ids that went in this round."""
    scores: dict[str, dict[str, float]]
    """Of each layer, by id, of the experts that were there; higher means keep."""
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By moment: ``all``, and ``domains`` where there are some."""
    load: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By moment: the skew of each layer's load with its ``counts``, and under ``mean`` that of all; see
    ``stats.usage``."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By part of the round."""
    tokens: int = 0
    """Tuned on, in this round."""
    steps: int = 0
    lr: float | None = None
    parameters: int = 0
    """Of the model after the round."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Further settings."""
    version: int = VERSION

    @property
    def last_moment(self) -> str | None:
        """The last moment that was measured."""
        return next((moment for moment in reversed(MOMENTS) if moment in self.perplexity), None)

    @property
    def final_perplexity(self) -> float | None:
        return None if self.last_moment is None else float(self.perplexity[self.last_moment]["all"])

    @property
    def final_load(self) -> dict[str, Any]:
        return {} if self.last_moment is None else self.load[self.last_moment]


def write_records(file: Path, records: Sequence[RoundRecord]) -> None:
    """Write all rounds so far, a line each; the file is whole at any moment."""
    with replaced_file(file) as beside:
        beside.write_text("".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records))


def read_records(file: Path) -> list[RoundRecord]:
    """The rounds in a file, none if it is not there. Raises ``InputError`` for what is no such file."""
    if not file.exists():
        return []
    records = []
    for line in file.read_bytes().splitlines():
        try:
            value: Mapping[str, Any] = json.loads(line)
            if value["version"] != VERSION:
                raise InputError(f"{file}: version {value['version']}, this program reads {VERSION}.")
            records.append(RoundRecord(**value))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{file}: line {len(records) + 1} is no record of a round ({first_line(error)})."
            ) from error
    return records


def make_record(
    before: Mapping[str, Sequence[int]],
    keep: dict[str, list[int]],
    scores: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Any] | None],
    seconds: Mapping[str, float],
    **more: Any,
) -> RoundRecord:
    """A record from what a round works with.

    ``before`` and ``keep`` are the ids that were there and are left, ``scores`` those of the former by place, and
    ``moments`` what was measured, None where nothing was. ``more`` are the other fields.
    """
    measured = {name: moment for name, moment in moments.items() if moment}
    return RoundRecord(
        keep=keep,
        dropped=dropped_ids(before, keep),
        scores=scores_by_id({name: score_E.tolist() for name, score_E in scores.items()}, before),
        perplexity={name: moment["perplexity"] for name, moment in measured.items()},
        load={name: moment["load"] for name, moment in measured.items()},
        seconds={name: round(value, 3) for name, value in seconds.items()},
        **more,
    )


def scores_by_id(
    scores: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, float]]:
    """Scores by place, of the experts that ``before`` names, under these names."""
    return {
        name: {str(expert): score for expert, score in zip(before[name], values, strict=True)}
        for name, values in scores.items()
    }


def dropped_ids(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """What is in ``before`` and not in ``after``."""
    return {name: sorted(set(ids) - set(after[name])) for name, ids in before.items()}
