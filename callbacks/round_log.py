"""What the rounds of a fit did and what was trained after each: in memory, in a file and in checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.ranks import rank
from lightning_moe.pruning.round_record import RoundRecord, write_records


def state_of(key: str, states: Mapping[str, Any], expected: Collection[str]) -> dict[str, Any] | None:
    """The state under ``key`` among those of a checkpoint's callbacks; None where it has none of that kind.

    Raises ``InputError`` where there is one of that kind under another key that none of the fit's callbacks has: of
    another method or ratio, say, by which a model that is cut would be taken for a whole one.
    """
    kind = key.partition("{")[0]
    others = [one for one in states if one.startswith(f"{kind}{{") and one not in expected]
    if key not in states and others:
        raise InputError(
            f"{kind}: the checkpoint is of {others[0]}, and this fit has {key}; go on with the former, or start a fit "
            "from the model that was exported."
        )
    return states.get(key)


class RoundLog:
    """The record of each round so far. ``folder`` is where ``rounds.jsonl`` goes, None for nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.records: list[RoundRecord] = []
        self.whole: list[LayerShape] = []
        """The layers before the first round."""
        self.tokens = 0
        """Trained on so far, over all ranks."""
        self.step = 0
        """Optimiser steps of the fit that is going on, or was last."""
        self._tokens_at_round = self._step_at_round = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "records": [asdict(record) for record in self.records],
            "whole": [asdict(shape) for shape in self.whole],
            "tokens": self.tokens,
            "tokens_at_round": self._tokens_at_round,
            "step_at_round": self._step_at_round,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [RoundRecord(**record) for record in state_dict["records"]]
        self.whole = [LayerShape(**shape) for shape in state_dict["whole"]]
        self.tokens, self._tokens_at_round = state_dict["tokens"], state_dict["tokens_at_round"]
        # Checkpoints of before there was this name say it in the record, of a fit that went on unbroken.
        last = self.records[-1].made_by["step"] if self.records else 0
        self._step_at_round = state_dict.get("step_at_round", last)

    @property
    def keep(self) -> dict[str, list[int]]:
        """Kept experts of each layer, by their ids in the whole model."""
        return self.kept[-1]

    @property
    def kept(self) -> list[dict[str, list[int]]]:
        """``keep`` before the first round and after each."""
        return [{s.name: list(range(s.num_experts)) for s in self.whole}, *(record.keep for record in self.records)]

    def begin_fit(self, step: int) -> None:
        """A fit begins at its step ``step``; what one before it trained since the last round stays counted."""
        self._step_at_round += step - self.step
        self.step = step

    def begin_round(self, record: RoundRecord) -> None:
        """The model has been cut; what is trained from now on counts for ``record``."""
        self.records.append(record)
        self._tokens_at_round, self._step_at_round = self.tokens, self.step
        self._write()

    def end_round(self, measured: dict[str, Any] | None) -> None:
        """Add to the last record what the training after it came to."""
        if not self.records:
            return
        last = self.records[-1]
        moments = {"after_finetune": measured} if measured else {}
        self.records[-1] = replace(
            last,
            tokens=self.tokens - self._tokens_at_round,
            steps=self.step - self._step_at_round,
            perplexity=last.perplexity | {name: one["perplexity"] for name, one in moments.items()},
            load=last.load | {name: one["load"] for name, one in moments.items()},
        )
        self._write()

    def _write(self) -> None:
        if self.folder is not None and rank() == 0:
            write_records(self.folder / "rounds.jsonl", self.records)
