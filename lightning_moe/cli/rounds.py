"""Rounds: estimate, prune, tune, and again; every step on disk, so that a killed run goes on from the last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_moe.cli.cut import cut_on_disk
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method
from lightning_moe.cli.recovery import Recovery, tune
from lightning_moe.cli.request import model_path, weights_type
from lightning_moe.cli.score import observe_into
from lightning_moe.cli.step_saves import StepSaves
from lightning_moe.cli.teacher import cache_teacher
from lightning_moe.criteria import Direction
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.data.teacher_cache import TeacherCache
from lightning_moe.errors import InputError
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.files import remove, write_json
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import all_finite
from lightning_moe.moe.export import export_model
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.ranks import check_shared
from lightning_moe.moe.split_tensors import is_sharded, local
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.plan import compose, cut_shapes
from lightning_moe.pruning.round_record import (
    MOMENTS,
    RoundRecord,
    make_record,
    read_records,
    write_records,
)
from lightning_moe.pruning.schedule import RoundSchedule, round_seed
from lightning_moe.pruning.scores import ExpertScores, score_experts
from lightning_moe.stats.store import VERSION, ModelStats

SAVE_SECONDS = 300.0
"""Seconds of tuning between two saves."""


@dataclass(frozen=True)
class RoundsRequest:
    """How to prune in rounds."""

    method: Method | None
    """None drops nothing and tunes the whole model round by round: what tuning alone is worth."""
    scope: Scope
    schedule: RoundSchedule
    recovery: Recovery
    lr: float
    """Highest learning rate of the tuning, in every round."""
    direction: Direction | None = None
    floor: int | None = None
    seed: int = 0
    tune_path: str | None = None
    """Text to tune on; None is the calibration text."""


class Rounds:
    """One run of rounds on one model; ``model`` ends as the last round left it.

    The folder holds ``rounds.jsonl`` and a folder per round: scores, what was measured so far, saves of the tuning,
    and the tuned model. The state on disk is read once, when this object is made: what other ranks write meanwhile
    changes no decision. Where no round tunes, the model is the whole one cut by the last record, and none is saved.

    Args:
        trainer: How and where to run.
        model: The model, whole.
        data: The calibration text.
        validation: The text that perplexity and load are measured on.
        request: How.
        shapes: The layers of the whole model.
        identity: The id of the checkpoint.
        folder: Of this very request.
        first: The scores of the whole model, and what was measured of it, where somebody has them.
        teachers: Where the whole model's answers lie, for runs that share them; default is ``folder``.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MoECausalLM,
        data: TextDataModule,
        validation: TextDataModule,
        request: RoundsRequest,
        shapes: Sequence[LayerShape],
        identity: str,
        folder: Path,
        first: tuple[ExpertScores | None, dict[str, Any] | None] = (None, None),
        teachers: Path | None = None,
    ) -> None:
        self.trainer, self.model, self.data, self.validation = trainer, model, data, validation
        self.request, self.shapes, self.identity, self.folder = request, list(shapes), identity, folder
        self.records = read_records(folder / "rounds.jsonl")[: len(request.schedule)]
        self._part: dict[str, Any] = self._read_part(len(self.records) + 1)
        self._first_scores, self._first_moment = first
        self._teacher: TeacherCache | None = None
        self._teachers = teachers or folder

    def run(self, on_round: Callable[[Sequence[RoundRecord]], None]) -> list[RoundRecord]:
        """Carry out the rounds that are left; ``on_round`` is told all records after each."""
        schedule = self.request.schedule
        if len(self.records) < len(schedule):
            self._teach()
        self._restore()
        for turn in range(len(self.records) + 1, len(schedule) + 1):
            self.records.append(self._round(turn))
            self._part = {}
            if self.trainer.is_global_zero:
                write_records(self.folder / "rounds.jsonl", self.records)
                remove(self._place(turn - 1))
            on_round(self.records)
        return self.records

    @property
    def tuned(self) -> bool:
        """Whether the model's weights are others than the checkpoint's."""
        return any(record.tokens for record in self.records)

    def _place(self, turn: int) -> Path:
        return self.folder / f"round-{turn:02d}"

    def _read_part(self, turn: int) -> dict[str, Any]:
        file = self._place(turn) / "part.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _keep_part(self, turn: int, **parts: Any) -> None:
        """Note finished pieces of a round."""
        self._part |= parts
        if self.trainer.is_global_zero:
            write_json(self._place(turn) / "part.json", self._part)

    def _teach(self) -> None:
        """With router-kd: what the whole model says of the text to tune on, while there is a whole model."""
        if self.request.recovery.kind == "router-kd":
            self._teacher = cache_teacher(self.trainer, self.model, self._tuning_text(0), self._teachers)

    def _restore(self) -> None:
        """The model as the last finished step left it."""
        begun = len(self.records) + 1
        place = self._place(begun if "tuned" in self._part else begun - 1) / "model"
        self.model.attach(self.trainer)
        check_shared(self.folder)
        if self.tuned or "tuned" in self._part:
            self.model.load(str(place))
            return
        self.model.configure_model()
        if self.records and self.request.method is not None:
            self._cut(begun, self.records[-1].keep, self.records[-1].keep)

    def _round(self, turn: int) -> RoundRecord:
        request, ratio = self.request, self.request.schedule.ratios[turn - 1]
        tokens = request.schedule.tokens[turn - 1]
        before = self.records[-1].keep if self.records else {s.name: list(range(s.num_experts)) for s in self.shapes}
        seconds: dict[str, float] = self._part.get("seconds", {})
        scores: dict[str, Tensor] = {}
        now_keep: dict[str, list[int]] = {}
        keep, comparable, made_by = before, True, {}
        if request.method is not None:
            if "scores" not in self._part:
                with _timed(seconds, "estimate"):
                    found = self._estimate(turn)
                self._keep_part(turn, scores=found.as_json(), seconds=seconds)
            now = cut_shapes(self.shapes, before)
            found = ExpertScores.from_json(self._part["scores"], now, self.identity, self.data.text.fingerprint)
            plan = make_plan(found, ratio, request.scope, request.floor, whole=self.shapes)
            scores, comparable, made_by = found.scores, found.comparable, plan.made_by
            now_keep, keep = plan.keep, compose(before, plan.keep)
        if "before_prune" not in self._part:
            last = _last_moment(self.records[-1]) if self.records else self._first_moment
            self._keep_part(turn, before_prune=last or self._measured(seconds), seconds=seconds)
        if "tuned" not in self._part:
            with _timed(seconds, "prune"):
                self._cut(turn, now_keep, keep)
            if "after_prune" not in self._part:
                same = self._part["before_prune"] if request.method is None else None
                self._keep_part(turn, after_prune=same or self._measured(seconds), seconds=seconds)
            if tokens or self.tuned:
                self._tune(turn, tokens, seconds)
        if tokens and "after_finetune" not in self._part:
            self._keep_part(turn, after_finetune=self._measured(seconds), seconds=seconds)
        moments = {name: self._part[name] for name in MOMENTS if name in self._part}
        return make_record(
            before,
            keep,
            scores,
            moments,
            seconds,
            round=turn,
            ratio=ratio,
            method=request.method.name if request.method is not None else "none",
            parameters=self.model.network.num_parameters(),
            made_by={**made_by, "comparable": comparable, "recovery": request.recovery.kind},
            **self._part.get("tuned", {}),
        )

    def _cut(self, turn: int, now_keep: Mapping[str, Sequence[int]], keep: Mapping[str, Sequence[int]]) -> None:
        """Drop what goes in this round: ``now_keep`` are ids of what is there now, ``keep`` of the whole model.

        A model that is split over ranks is cut on disk, where nobody needs to hold it, and loaded anew.
        """
        if not is_sharded(self.model.network):
            keep_experts(self.model.network, now_keep)
            return
        folder = self._place(turn) / "cut"
        if self.tuned:
            cut_on_disk(self.trainer, self.model, str(self._place(turn - 1) / "model"), now_keep, folder)
        else:
            cut_on_disk(self.trainer, self.model, model_path(self.model), keep, folder)

    def _estimate(self, turn: int) -> ExpertScores:
        """Scores of the experts that are left, on the calibration text."""
        if turn == 1 and self._first_scores is not None:
            return self._first_scores
        request, method, place = self.request, self.request.method, self._place(turn)
        assert method is not None
        identity = self.identity if turn == 1 else f"{self.identity}+{turn - 1}-rounds"

        def observe(model: MoECausalLM, gradients: bool) -> ModelStats:
            file, partial = place / "stats.safetensors", place / f"observation-{VERSION}"
            precision, ranks = weights_type(self.trainer, model), method.stable_ranks
            where = (self.trainer, model, self.data, file, partial, identity, precision)
            return observe_into(*where, stable_ranks=ranks, gradients=gradients)

        job = Job(self.trainer, self.model, self.data, observe, identity, self.shapes)
        seed = round_seed(request.seed, turn) if method.seeded else 0
        if request.direction is not None:
            return score_experts(method.stats(job), method.name, request.direction, seed)
        return method.run(job, request.schedule.ratios[turn - 1], seed, place / "search")

    def _measured(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Perplexity, and how even the load is, on the validation text."""
        with _timed(seconds, "measure"):
            figures = measure(self.trainer, self.model, self.validation)
        return as_moment(figures)

    def _tuning_text(self, turn: int) -> TextDataModule:
        # As many windows as all rounds together need; each round draws from them in an order of its own.
        total = sum(self.request.schedule.tokens)
        seed = round_seed(self.request.seed, turn + 1)
        return self.data.training(self.request.tune_path, total, seed, self.trainer.world_size)

    def _tune(self, turn: int, tokens: int, seconds: dict[str, float]) -> None:
        request, place = self.request, self._place(turn)
        tuned: dict[str, Any] = {"steps": 0, "tokens": 0, "lr": None}
        if tokens:
            saves = StepSaves(place / "saves", every_seconds=SAVE_SECONDS)
            text = self._tuning_text(turn)
            with _timed(seconds, "tune"):
                done = tune(
                    self.trainer, self.model.network, text, request.recovery, tokens, request.lr, saves, self._teacher
                )
            tuned = {"steps": done.steps, "tokens": done.tokens, "lr": request.lr}
            finite = all(all_finite(local(parameter)) for parameter in self.model.network.parameters())
            if not self.trainer.strategy.reduce_boolean_decision(finite, all=True):
                raise InputError(f"--finetune_lr {request.lr:.3g}: the tuning of round {turn} diverged; lower it.")
        with _timed(seconds, "save"):
            export_model(self.model.network, place / "model")
        self._keep_part(turn, tuned=tuned, seconds=seconds)
        if self.trainer.is_global_zero:
            remove(place / "saves")


def as_moment(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What ``measure`` gives, as a record keeps it."""
    names = ("domains", "tokens", "loss", "tokens_per_second")
    return {
        "perplexity": {"all": figures["perplexity"], **{name: figures[name] for name in names}},
        "load": figures["load"],
    }


def _last_moment(record: RoundRecord) -> dict[str, Any]:
    """What was measured last in a round: the next one begins with it."""
    assert record.last_moment is not None
    return {"perplexity": record.perplexity[record.last_moment], "load": record.final_load}


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the time of a piece of work to those before it."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start
