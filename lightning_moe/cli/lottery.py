"""``prune`` in rounds: one-shot with tuning, iterative, and the MoE Lottery (MC-Suite, arXiv 2504.05586)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.callbacks.figure_logging import save_figure
from lightning_moe.callbacks.usage_panels import load_before_and_after
from lightning_moe.cli.cut import Cut, note_order, reduction, target_of
from lightning_moe.cli.display import show_rounds
from lightning_moe.cli.methods import get_method
from lightning_moe.cli.recovery import clipping
from lightning_moe.cli.request import (
    asked_batches,
    asked_data,
    asked_model,
    asked_validation,
    checkpoint_size,
    model_path,
    refuse_less_text,
    seed,
)
from lightning_moe.cli.round_options import HALF_PRECISION, RoundOptions, prepare_tuning
from lightning_moe.cli.rounds import Rounds, RoundsRequest
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.unheeded import UPDATES, refuse_other_lengths
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes, read_config
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.export import export_model
from lightning_moe.pruning.plan import PruningPlan
from lightning_moe.pruning.round_record import RoundRecord, write_records
from lightning_moe.pruning.schedule import check_rounds
from lightning_moe.report.rounds_figure import rounds_figure


def prune_in_rounds(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    cut: Cut,
    options: RoundOptions,
    overwrite: bool,
) -> dict[str, Any] | None:
    """Write model/, plan.json, rounds.jsonl and figures/."""
    path = model_path(model)
    method = get_method(cut.method)
    shapes = layer_shapes(path)
    options.check()
    if method.one_cut is not None:
        later = "" if method.weights is not None else ", and tune the model it writes with `fit`"
        raise InputError(
            f"--method {method.name}: it {method.one_cut}, in one cut; leave out --rounds and --finetune_tokens{later}."
        )
    if data.path is None:
        raise InputError("rounds estimate anew each time, so they need text: give --data.path.")
    schedule = options.schedule(cut.ratio)
    check_rounds(shapes, schedule, cut.scope, cut.floor)
    for option in ("limit_predict_batches", "limit_val_batches"):
        refuse_less_text(trainer, option)
    if options.tokens:
        prepare_tuning(trainer, model, data, options)
    elif method.batchwise:
        refuse_other_lengths(trainer, data, UPDATES)
    target = target_of(out, path)
    validation = data.validation()
    asked_of = asked_model(trainer, model)
    asked = asked_of | cut.asked() | {"seed": seed()} | asked_data(data)
    asked |= asked_validation(validation) | options.asked()
    if method.needs_text or options.tokens:
        # None where it is as usual: so it stands in what was asked before.
        asked |= asked_batches(trainer, data) | {"gradient_clip_val": None} | clipping(trainer)
    if method.needs_text:
        asked |= {"search": method.settings}
    run = RunFolder(out, "prune", asked, overwrite)
    if run.finished and target.is_dir():
        return run.finished
    data.setup("predict")
    validation.setup("validate")
    if options.tokens:
        options.check_text(data, sum(schedule.tokens), trainer.world_size)
    lr = options.lr_of(checkpoint_size(path)["parameters"])
    request = RoundsRequest(
        method, cut.scope, schedule, options.recovery, lr, cut.direction, cut.floor, seed(), options.tune_path
    )
    folder = run.partial(**asked_batches(trainer, data))
    rounds = Rounds(trainer, model, data, validation, request, shapes, asked_of["model_id"], folder)
    if trainer.is_global_zero:
        run.begin()
        if data.val_path is None:
            print("note: perplexity is measured on the calibration text; for other text give --data.val_path.")
        if rounds.records:
            print(f"Going on after round {len(rounds.records)} of an earlier run:")
            show_rounds(rounds.records)

    def on_round(records: Sequence[RoundRecord]) -> None:
        if trainer.is_global_zero:
            write_records(run.folder / "rounds.jsonl", records)
            show_rounds(records[-1:], first=len(records) == 1)

    try:
        records = rounds.run(on_round)
    except (KeyboardInterrupt, SystemExit):
        if trainer.is_global_zero:
            print("Stopped; the same command goes on from the last finished step.", file=sys.stderr)
        raise
    last = records[-1]
    if rounds.tuned:
        export_model(model.network, target, tokenizer=path, dtype=_stored_type(path))
    if not trainer.is_global_zero:
        return None
    note_order(method.name, cut.scope, bool(last.made_by["comparable"]))
    plan = PruningPlan(last.keep, asked_of["model_id"], data.text.fingerprint, last.made_by | options.asked())
    if not rounds.tuned:
        compact_checkpoint(path, last.keep, target)
    plan.save(run.folder / "plan.json")
    write_records(run.folder / "rounds.jsonl", records)
    _draw(run.folder / "figures", records)
    first = records[0]
    return run.finish(
        {
            "model_id": asked_of["model_id"],
            "data_fingerprint": data.text.fingerprint,
            "method": cut.method,
            "ratio": cut.ratio,
            "scope": cut.scope,
            "rounds": len(records),
            **reduction(path, target, shapes, last.keep),
            "perplexity_before": first.perplexity["before_prune"]["all"],
            "perplexity_after": last.final_perplexity,
            "load_cv_before": first.load["before_prune"]["mean"]["cv"],
            "load_cv_after": last.final_load["mean"]["cv"],
            "finetune_tokens": sum(record.tokens for record in records),
            "finetune_lr": last.lr,
            "world_size": trainer.world_size,
        },
        "plan.json",
    )


def _stored_type(path: str) -> str | None:
    """The type of the checkpoint's weights, as ``save_model`` names it; None keeps that of the model."""
    dtype = read_config(path).dtype
    return str(dtype).removeprefix("torch.") if dtype in HALF_PRECISION else None


def _draw(folder: Path, records: Sequence[RoundRecord]) -> None:
    save_figure(folder / "rounds.png", rounds_figure(records))
    before, after = (
        {name: layer["counts"] for name, layer in load.items() if name != "mean"}
        for load in (records[0].load["before_prune"], records[-1].final_load)
    )
    titles = ("whole model", f"after {len(records)} rounds")
    save_figure(folder / "expert_usage.png", load_before_and_after(before, after, titles))
