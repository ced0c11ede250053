"""``evaluate``: perplexity of a model, pruned or not."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.cli.request import asked_data, asked_model, checkpoint_size, model_path, refuse_less_text
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes


def evaluate(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, out: str, overwrite: bool
) -> dict[str, Any] | None:
    """Write evaluate.json: perplexity per domain and overall."""
    path = model_path(model)
    layer_shapes(path)
    refuse_less_text(trainer, "limit_val_batches")
    asked = asked_model(trainer, model)
    run = RunFolder(out, "evaluate", asked | asked_data(data), overwrite)
    if run.finished:
        return run.finished
    figures = measure(trainer, model, data)
    if not trainer.is_global_zero:
        return None
    run.begin()
    origin = {"model_id": asked["model_id"], "data_fingerprint": data.text.fingerprint}
    return run.finish(origin | figures | checkpoint_size(path))
