"""Perplexity per domain and overall, and the speed at which it was measured."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.guests import guests
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.stats.usage import load_record


class BatchTimer(Callback):
    """Seconds and tokens of the batches of a validation loop, the first left out when there are more."""

    def __init__(self) -> None:
        self._batches: list[tuple[float, int]] = []
        self._start = 0.0

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        tokens = int(batch["attention_mask"].sum())  # waits for the device
        self._batches.append((time.perf_counter() - self._start, tokens))

    @property
    def tokens_per_second(self) -> float:
        """Median over batches: one that was disturbed does not count."""
        timed = self._batches[1:] or self._batches
        return statistics.median(tokens / max(seconds, 1e-9) for seconds, tokens in timed)


def check_vocabulary(model: MoECausalLM, data: TextDataModule) -> None:
    """Raise ``InputError`` when the text holds token ids that the model has no embedding for."""
    embedding = model.network.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rows, largest = embedding.num_embeddings, int(data.text.tokens_NS.max())
    if largest >= rows:
        raise InputError(
            f"--data.tokenizer {data.tokenizer}: it gives token id {largest}, but the model knows ids below {rows}; "
            "give the model's own tokenizer."
        )


def measure(trainer: Trainer, model: MoECausalLM, data: TextDataModule) -> dict[str, Any]:
    """Run a validation loop and return its figures.

    ``perplexity`` and ``loss`` over all predicted ``tokens``, ``domains`` (perplexity of each file), the ``load`` of
    the experts (its skew and ``counts`` layer by layer, and the ``mean`` over layers; see ``stats.usage``) and this
    rank's ``tokens_per_second``. Raises ``InputError`` when the perplexity is not finite.
    """
    data.setup("validate")
    model.prepare(trainer)
    check_vocabulary(model, data)
    timer, monitor = BatchTimer(), ExpertUsageMonitor()
    with guests(trainer, timer, monitor):
        trainer.validate(model, datamodule=data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    prefix = "validate/perplexity"
    if not math.isfinite(logged[prefix]):
        raise InputError(f"--model.path {model.path}: its perplexity is {logged[prefix]}; are the weights damaged?")
    return {
        "perplexity": logged[prefix],
        "loss": logged["validate/loss"],
        "tokens": int(logged["validate/tokens"]),
        "domains": {name.removeprefix(f"{prefix}/"): v for name, v in logged.items() if name.startswith(f"{prefix}/")},
        "load": load_record(monitor.last),
        "tokens_per_second": round(timer.tokens_per_second, 1),
        "world_size": trainer.world_size,
    }
