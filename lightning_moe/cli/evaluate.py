"""``evaluate``: perplexity of a model, pruned or not, with all its experts or some skipped."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.callbacks.guests import guests
from lightning_moe.cli.request import asked_data, asked_model, checkpoint_size, model_path, refuse_less_text
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.score import known_stats
from lightning_moe.cli.skipping import Skipping, wanted_entry
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.evaluation.skip_count import SkipCount
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.skip_tables import refresh_skipping, store_entry


def evaluate(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    overwrite: bool,
    skipping: Skipping = None,
    stats_file: str | None = None,
) -> dict[str, Any] | None:
    """Write evaluate.json: perplexity per domain and overall, and the fraction of assignments that were skipped."""
    path = model_path(model)
    shapes = layer_shapes(path)
    refuse_less_text(trainer, "limit_val_batches")
    asked = asked_model(trainer, model)
    if stats_file is not None and not skipping:
        raise InputError(f"--stats {stats_file}: it gives the tables to skip by; add --skipping true or naee.")
    stats = None if stats_file is None else known_stats(stats_file, asked["model_id"], shapes)
    entry = None if skipping is None else wanted_entry(path, stats, skipping)
    request = asked | asked_data(data)
    if skipping is not None:
        request["skipping"] = skipping
    if stats is not None:
        request["stats"] = stats.data_fingerprint
    run = RunFolder(out, "evaluate", request, overwrite)
    if run.finished:
        return run.finished
    if entry is not None:
        model.prepare(trainer)
        store_entry(model.network.config, entry)
        refresh_skipping(model.network)
    count = SkipCount()
    with guests(trainer, count):
        figures = measure(trainer, model, data)
    if not trainer.is_global_zero:
        return None
    run.begin()
    origin = {"model_id": asked["model_id"], "data_fingerprint": data.text.fingerprint}
    return run.finish(origin | figures | {"skipped": count.fractions} | checkpoint_size(path))
