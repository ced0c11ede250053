"""``compare``: methods x ratios x scopes x seeds on one model, cell by cell, to one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console

from lightning_moe.cli.cells import GRADIENTS, OBSERVATION, Comparison
from lightning_moe.cli.grid import Cell
from lightning_moe.cli.leaving import part
from lightning_moe.cli.request import (
    asked_data,
    asked_model,
    asked_validation,
    model_path,
    refuse_less_text,
)
from lightning_moe.cli.round_options import RoundOptions, prepare_tuning
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.unheeded import UPDATES, refuse_other_lengths
from lightning_moe.cli.weight_pruning import check_weight_cells
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.pruning.schedule import check_rounds
from lightning_moe.report.agreement import write_agreements
from lightning_moe.report.comparison import FULL, spreads, with_gaps, write_csv
from lightning_moe.report.comparison_table import show_comparison
from lightning_moe.strategies import MoEFSDPStrategy


def compare(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    grid: Sequence[Cell],
    overwrite: bool,
    options: RoundOptions | None = None,
) -> None:
    """Fill the grid, write compare.json and compare.csv, print the table; leave with code 1 when cells failed.

    Each finished cell is a file at once. Cells that are there already are not computed again, whatever else the
    grid held when they were; failed ones are tried again.
    """
    shapes = layer_shapes(model_path(model))
    for option in ("limit_predict_batches", "limit_val_batches"):
        refuse_less_text(trainer, option)
    options = options or RoundOptions()
    options.check()
    merging = sorted({cell.method_name for cell in grid if cell.method is not None and cell.method.merge is not None})
    if merging and isinstance(trainer.strategy, MoEFSDPStrategy):
        raise InputError(
            f"--methods: {' and '.join(merging)} merge experts, which cannot be done in memory where moe_fsdp splits "
            "the model; compare them on one device, or `prune` by them, which merges on disk, and `evaluate`."
        )
    pruning = [cell.method for cell in grid if cell.method is not None]
    check_weight_cells(pruning, model_path(model), getattr(trainer.strategy, "quantize", None))
    for cell in grid:
        if cell.schedule is not None and cell.method is not None:
            check_rounds(shapes, cell.schedule, cell.scope)
    if options.tokens:
        prepare_tuning(trainer, model, data, options)
    elif any(method.batchwise for method in pruning):
        refuse_other_lengths(trainer, data, UPDATES)
    validation = data.validation()
    asked = asked_model(trainer, model) | asked_data(data)
    asked |= asked_validation(validation)
    asked |= {"data.batch_size": data.batch_size}  # no matter to a criterion, but to a search
    run = RunFolder(out, "compare", asked, overwrite)
    data.setup("predict")
    validation.setup("validate")
    if options.tokens:
        options.check_text(data, options.tokens, trainer.world_size)
    say = Console(soft_wrap=True, highlight=False, quiet=not trainer.is_global_zero)
    if data.val_path is None:
        say.print("note: perplexity is measured on the calibration text; for other text give --data.val_path.")
    # Asked again to overwrite after a kill, it goes on with what it has begun to write.
    comparison = Comparison(trainer, model, shapes, data, validation, run, options, anew=overwrite and not run.begun)
    origin = {"model_id": asked["model_id"], "data_fingerprint": data.text.fingerprint}
    origin["validation_fingerprint"] = validation.text.fingerprint
    try:
        full = comparison.full_model(say.print)
        if trainer.is_global_zero and run.finished is None:
            run.save({**origin, "finished": False})  # from now on the folder belongs to this request
        rows = [full, *comparison.rows(grid, say.print)]
    except (KeyboardInterrupt, SystemExit):
        if trainer.is_global_zero:
            print("Stopped; the same command goes on after the last finished cell.", file=sys.stderr)
        raise
    failed = [row for row in rows if row["status"] == "failed"]
    rows = with_gaps(rows)
    if trainer.is_global_zero:
        entries = spreads(rows)
        write_csv(run.folder / "compare.csv", rows)
        write_agreements(run.folder, rows)
        figures = {
            **origin,
            "finished": True,
            "computed": comparison.computed,
            "failed": len(failed),
            "observation_seconds": comparison.seconds_of(OBSERVATION),
            "gradient_seconds": comparison.seconds_of(GRADIENTS),
            "spread": entries,
            "cells": rows,
        }
        run.save(figures) if failed else run.finish(figures)
        show_comparison(entries)
        _note_orders(rows, say.print)
        if any("nonzero_parameters" in row for row in rows):
            say.print("note: 2:4 sets that share of the experts' weights to zero; it drops no expert and no byte.")
        _note_shares(rows, say.print)
        for what, shared in ((OBSERVATION, "statistics shared one pass"), (GRADIENTS, "gradients shared passes")):
            seconds = comparison.seconds_of(what)
            if seconds is not None:
                say.print(f"Methods on {shared} over the text of {seconds:,.3g} s.")
        earlier = len(rows) - len(failed) - comparison.computed
        say.print(f"{comparison.computed} cells computed now, {earlier} earlier, {len(failed)} failed.")
        say.print(f"Results are in {out}: compare.csv, compare.json, and a file for each cell in cells.")
        if failed:
            print(
                f"lightning-moe: {len(failed)} of {len(rows)} cells failed, the first with: {failed[0]['reason']} "
                "The same command tries them again.",
                file=sys.stderr,
            )
    if failed:
        part()
        sys.exit(1)


def _note_shares(rows: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Where whole experts, or whole layers, do not come to the ratio."""
    whole = rows[0]["experts"]
    cut = [row for row in rows if row["method"] != FULL and "plan" in row and "nonzero_parameters" not in row]
    gone = {(row["method"], row["scope"], row["ratio"]): 1 - row["experts"] / whole for row in cut}
    other = [
        f"{method}, {scope}, {100 * ratio:g}%: {100 * share:.1f}%"
        for (method, scope, ratio), share in gone.items()
        if abs(share - ratio) > 0.005
    ]
    if other:
        say(f"note: experts that are gone, to the nearest whole one or layer: {'; '.join(other)}.")


def _note_orders(rows: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    orders = {row["method"] for row in rows if row["scope"] == "global" and not row.get("comparable", True)}
    if orders:
        say(
            f"note: {', '.join(sorted(orders))}: an order of dropping within each layer; scope global compares the "
            "places in these orders, not how much the experts of two layers matter."
        )
