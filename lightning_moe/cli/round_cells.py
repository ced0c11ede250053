"""The cells of ``compare`` that are moments of a run of rounds, and the figures of any cell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_moe.cli.grid import Cell
from lightning_moe.cli.job import Job
from lightning_moe.cli.records import Records
from lightning_moe.cli.request import checkpoint_size
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.cli.rounds import Rounds, RoundsRequest, as_moment
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, describe
from lightning_moe.files import remove
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.pruned_size import pruned_size
from lightning_moe.pruning.round_record import RoundRecord
from lightning_moe.pruning.scores import ExpertScores

METHOD_PARTS = ("estimate", "prune", "tune")
"""The parts of a round that are the method's own work."""


class RoundRuns:
    """Runs of rounds, each made once for all cells that are moments of it.

    Args:
        job: Model and calibration text.
        validation: The text to measure on.
        run: Of the whole comparison.
        records: Where finished runs are kept.
        options: How rounds are made.
        shapes: The layers of the whole model.
    """

    def __init__(
        self,
        job: Job,
        validation: TextDataModule,
        run: RunFolder,
        records: Records,
        options: RoundOptions,
        shapes: Sequence[LayerShape],
    ) -> None:
        self.job, self.validation, self.run, self.records = job, validation, run, records
        self.options, self.shapes = options, shapes
        self._failed: dict[str, str] = {}

    def of(self, cell: Cell, scores: ExpertScores | None, full: Mapping[str, Any] | None) -> list[RoundRecord]:
        """The rounds that the cell is a moment of; ``scores`` are of the whole model, ``full`` is what it measured."""
        record = self.records.get(cell.run_name)
        if record is None:
            if cell.run_name in self._failed:
                raise InputError(self._failed[cell.run_name])
            try:
                done = self._carried_out(cell, scores, full)
            except Exception as error:
                self._failed[cell.run_name] = describe(error)
                raise
            record = self.records.put(cell.run_name, {"rounds": [asdict(one) for one in done]})
            if self.job.trainer.is_global_zero:
                remove(self._folder(cell))  # not before the record is there, or a kill would lose all rounds
        return [RoundRecord(**one) for one in record["rounds"]]

    def _carried_out(
        self, cell: Cell, scores: ExpertScores | None, full: Mapping[str, Any] | None
    ) -> list[RoundRecord]:
        assert cell.schedule is not None
        trainer, model = self.job.trainer, self.job.whole_model_to_change()
        lr = self.options.lr_of(checkpoint_size(self.run.request["model.path"])["parameters"])
        request = RoundsRequest(
            cell.method,
            cell.scope,
            cell.schedule,
            self.options.recovery,
            lr,
            seed=cell.seed or 0,
            tune_path=self.options.tune_path,
        )
        first = scores, None if full is None else as_moment(full)
        identity = self.run.request["model_id"]
        rounds = Rounds(
            trainer,
            model,
            self.job.data,
            self.validation,
            request,
            self.shapes,
            identity,
            self._folder(cell),
            first,
            self.run.partial(teachers=True),
        )
        return rounds.run(lambda records: None)

    def _folder(self, cell: Cell) -> Path:
        """Of the unfinished run."""
        return self.run.partial(rounds=cell.run_name, world_size=self.job.trainer.world_size)


def derived_figures(
    figures: Mapping[str, Any],
    keep: Mapping[str, list[int]],
    path: str,
    shapes: Sequence[LayerShape],
    blocks: Sequence[str] = (),
) -> dict[str, Any]:
    """What follows from the measured ``figures`` and the plan: means, sizes, counts."""
    counts = {shape.name: len(keep.get(shape.name, range(shape.num_experts))) for shape in shapes}
    return {
        "domain_mean": statistics.fmean(figures["domains"].values()),
        "load_cv": figures["load"]["mean"]["cv"],
        **pruned_size(path, keep, blocks),
        "experts": sum(counts.values()),
        "kept_experts": counts,
        "plan": dict(keep),
        **({"blocks": list(blocks)} if blocks else {}),
    }


def figures_of_round(
    records: Sequence[RoundRecord], ratio: float, path: str, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """Of the model at the end of the round that reached ``ratio``."""
    until = next(place for place, record in enumerate(records) if record.ratio == ratio) + 1
    record, so_far = records[until - 1], records[:until]
    assert record.last_moment is not None
    measured = dict(record.perplexity[record.last_moment])
    figures = {"perplexity": measured.pop("all"), **measured, "load": record.final_load}
    parts = [one.seconds.get(part, 0.0) for one in so_far for part in METHOD_PARTS]
    return {
        **figures,
        "load_cv_pruned": record.load["after_prune"]["mean"]["cv"],
        "perplexity_pruned": record.perplexity["after_prune"]["all"],
        "finetune_tokens": sum(one.tokens for one in so_far),
        "finetune_lr": record.lr,
        "rounds": until,
        "method_seconds": sum(parts),
        "comparable": record.made_by["comparable"],
        "made_by": record.made_by,
    } | derived_figures(figures, record.keep, path, shapes)
