"""Perplexity and load of a model in the midst of a fit, on any batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import next_token_loss
from lightning_moe.search.in_memory import evaluating, on_device
from lightning_moe.stats.usage import RouterCounts, load_record


def in_fit_measure(model: PreTrainedModel, batches: Iterable[Any]) -> dict[str, Any]:
    """Next-token perplexity over all real tokens, and the load of the experts, as a record keeps them."""
    counts = RouterCounts(model)
    loss, tokens = 0.0, 0
    with evaluating(model), torch.no_grad(), counts.attached():
        for batch in on_device(batches, model.device):
            counts.next_batch(batch["attention_mask"])
            loss_B, count_B = next_token_loss(model(**batch, use_cache=False).logits, batch)
            loss, tokens = loss + float(loss_B.double().sum()), tokens + int(count_B.sum())
    mean = loss / max(tokens, 1)
    if not math.isfinite(mean):
        raise InputError(f"the loss on the evaluation batches is {mean}; the model is damaged.")
    return {
        "perplexity": {"all": math.exp(min(mean, 700.0)), "loss": mean, "tokens": tokens},
        "load": load_record(counts.take(lambda count_E: count_E)),
    }
