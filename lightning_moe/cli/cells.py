"""Comparison: computes the cells of ``compare`` on one model, one calibration text and one validation text."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.cli.grid import Cell
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method
from lightning_moe.cli.records import Records, without_stamp
from lightning_moe.cli.request import model_path
from lightning_moe.cli.round_cells import RoundRuns, derived_figures, figures_of_round
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.score import observe
from lightning_moe.cli.weight_pruning import zeroed_model
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, describe
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.files import remove
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.merged_experts import NO_MERGE, Merge
from lightning_moe.moe.ranks import gathered
from lightning_moe.pruning.budget import check_ratio, make_plan
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.report.comparison import FULL
from lightning_moe.stats.store import ModelStats

OBSERVATION, GRADIENTS = "observation", "gradient-passes"
"""The records that say how long the shared passes took."""


class Comparison:
    """Computes cells on one model, one calibration text and one validation text."""

    def __init__(
        self,
        trainer: Trainer,
        model: MoECausalLM,
        shapes: Sequence[LayerShape],
        data: TextDataModule,
        validation: TextDataModule,
        run: RunFolder,
        options: RoundOptions,
        anew: bool,
    ) -> None:
        self.trainer, self.data, self.validation, self.run = trainer, data, validation, run
        self.path, self.shapes = model_path(model), shapes
        self.job = Job(trainer, model, data, self._observed)
        self._cells, self._scores, rounds = self._records = [
            Records(run.folder / name, run.request, writes=trainer.is_global_zero)
            for name in ("cells", "scores", "rounds")
        ]
        self._rounds = RoundRuns(self.job, validation, run, rounds, options, shapes)
        self._anew = anew
        self._failed_scores: dict[str, str] = {}
        self._full: dict[str, Any] | None = None
        self.computed = 0
        """Cells computed, not found."""

    def seconds_of(self, what: str) -> float | None:
        """Of the passes that all methods on statistics, or on gradients, share; None when others had made them.

        After a kill within a pass, only of the part that came later.
        """
        record = self._scores.get(what)
        return None if record is None else float(record["seconds"])

    def _observed(self, whole: MoECausalLM, gradients: bool) -> ModelStats:
        file, start = self.run.folder / "stats.safetensors", time.perf_counter()
        before = file.stat().st_mtime_ns if file.exists() else None
        stats = observe(self.trainer, whole, self.data, self.run, gradients)
        if self.trainer.is_global_zero and file.stat().st_mtime_ns != before:
            what = GRADIENTS if gradients else OBSERVATION
            self._scores.put(what, {"seconds": round(time.perf_counter() - start, 3)})
        return stats

    def rows(self, grid: Sequence[Cell], say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Every cell: found, or computed."""
        rows = []
        found = [self._cells.get(cell.file_name) for cell in grid]
        done = [row if row is not None and row["status"] == "done" else None for row in found]
        other = sum(row is not None and not cell.made(row) for cell, row in zip(grid, done, strict=True))
        if other:
            say(f"note: {other} cells of other rounds, tuning or ranks are there, and made anew in their place.")
        for turn, (cell, row) in enumerate(zip(grid, done, strict=True), start=1):
            if row is None or not cell.made(row):
                row = self._computed(cell)
                what = f"perplexity {row['perplexity']:.4g}" if row["status"] == "done" else f"failed: {row['reason']}"
                say(f"{turn} of {len(grid)}: {cell.title}: {what}")
            rows.append(row)
        return [without_stamp(row) for row in rows]

    def full_model(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The model as it is. What fails here would fail in every cell, so it is not caught."""
        row = None if self._anew else self._cells.get(FULL)
        if row is None:
            settings = {"method": FULL, "strategy": "one-shot", "scope": None, "ratio": 0.0, "seed": None}
            settings["status"] = "done"
            settings |= self._figures({})
            if self._anew:  # not before something is there to stand in its place
                for records in self._records:
                    records.clear()
            row = self._cells.put(FULL, settings)
            self.computed += 1
            say(f"full model: perplexity {row['perplexity']:.4g}")
        self._full = row
        return without_stamp(row)

    def _computed(self, cell: Cell) -> dict[str, Any]:
        try:
            found, reason = self._measured(cell), None
        except Exception as error:  # whatever it is, the other cells are worth having
            if self.trainer.world_size > 1 and not isinstance(error, InputError):
                raise  # of this rank alone, perhaps, and the others would wait for it within the cell
            found, reason = {}, describe(error)
            if not isinstance(error, InputError):
                found = {"traceback": traceback.format_exc().splitlines()}
        reason = self._agreed(reason)
        if reason is None:
            self.computed += 1
            return self._cells.put(cell.file_name, cell.settings | {"status": "done"} | found)
        failure = {"status": "failed", "reason": reason, "traceback": found.get("traceback")}
        return self._cells.put(cell.file_name, cell.settings | failure)

    def _agreed(self, reason: str | None) -> str | None:
        """A cell that failed on one rank has failed on all."""
        return next((one for one in gathered(reason) if one is not None), None)

    def _measured(self, cell: Cell) -> dict[str, Any]:
        if cell.method is not None:
            cell.method.check_scope(cell.scope)
            if cell.method.weights is not None:
                return self._with_zeros(cell.method, cell.seed)
        if cell.schedule is not None:
            first = replace(cell, ratio=cell.schedule.ratios[0])
            scores, seconds = (None, 0.0) if cell.method is None else self._scored(first)
            records = self._rounds.of(cell, scores, self._full)
            figures = figures_of_round(records, cell.ratio, self.path, self.shapes)
            return figures | {"method_seconds": figures["method_seconds"] + seconds}
        drops = "experts" if cell.method is None else cell.method.drops
        check_ratio(self.shapes, cell.ratio, cell.scope, drops=drops)  # an impossible one fails before the method runs
        scores, seconds = self._scored(cell)
        plan = make_plan(scores, cell.ratio, cell.scope)
        figures = {"method_seconds": seconds, "comparable": scores.comparable, "made_by": plan.made_by}
        if cell.method is None or cell.method.merge is None:
            return self._figures(plan.keep, blocks=plan.blocks) | figures
        merge = cell.method.merge(self.job.stats, plan.keep)
        return self._figures(plan.keep, merge) | figures | {"merge": merge.groups, **merge.settings}

    def _with_zeros(self, method: Method, seed: int | None) -> dict[str, Any]:
        """What the model is worth with some weights of all experts set to zero."""
        model, made = zeroed_model(self.job, self.run, method, seed)
        figures = measure(self.trainer, model, self.validation)
        return figures | derived_figures(figures, {}, self.path, self.shapes) | made

    def _figures(
        self, keep: dict[str, list[int]], merge: Merge = NO_MERGE, blocks: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What the model is worth with only these experts, others merged into them, and without these layers."""
        with self.job.cut_model(keep, merge, blocks) as model:
            figures = measure(self.trainer, model, self.validation)
        return {**figures, "method_seconds": None} | derived_figures(figures, keep, self.path, self.shapes, blocks)

    def _scored(self, cell: Cell) -> tuple[ExpertScores, float]:
        """The scores of the cell's method and the seconds they took, made once for all cells that share them."""
        assert cell.method is not None
        key = cell.method.key(cell.ratio, cell.seed, self.trainer.world_size)
        record = self._scores.get(key)
        if record is None:
            if key in self._failed_scores:
                raise InputError(self._failed_scores[key])
            also = {"batch_size": self.data.batch_size, "world_size": self.trainer.world_size}
            folder = self.run.partial(method=key, **also)
            record = self._scores.put(key, self._run_method(cell, key, folder))
            if self.trainer.is_global_zero:
                remove(folder)  # not before the record is there, or a kill would lose a finished search
        scores = ExpertScores.from_json(record["scores"], self.shapes, record["model_id"], record["data_fingerprint"])
        return scores, record["seconds"]

    def _run_method(self, cell: Cell, key: str, folder: Path) -> dict[str, Any]:
        assert cell.method is not None
        start, before = time.perf_counter(), self.job.preparation_seconds
        try:
            scores = cell.method.run(self.job, cell.ratio, cell.seed, folder)
        except Exception as error:
            self._failed_scores[key] = describe(error)
            raise
        seconds = time.perf_counter() - start - (self.job.preparation_seconds - before)
        return {
            "model_id": scores.model_id,
            "data_fingerprint": scores.data_fingerprint,
            "seconds": round(seconds, 3),
            "scores": scores.as_json(),
        }
