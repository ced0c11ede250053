"""Perplexity and load of a model in the midst of a fit, on any batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import next_token_loss, padding_mask
from lightning_moe.moe.layers import computing_device
from lightning_moe.moe.ranks import sum_over_ranks
from lightning_moe.search.in_memory import evaluating, on_device
from lightning_moe.stats.usage import RouterCounts, load_record


def in_fit_measure(model: PreTrainedModel, batches: Iterable[Any]) -> dict[str, Any]:
    """Next-token perplexity over all real tokens, and the load of the experts, as a record keeps them."""
    counts, device = RouterCounts(model), computing_device(model)
    loss, tokens = 0.0, 0
    with evaluating(model), torch.no_grad(), counts.attached():
        for batch in on_device(batches, device):
            counts.next_batch(batch["attention_mask"])
            output = model(input_ids=batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False)
            loss_B, count_B = next_token_loss(output.logits, batch)
            loss, tokens = loss + float(loss_B.double().sum()), tokens + int(count_B.sum())
    sums = sum_over_ranks(torch.tensor([loss, tokens], dtype=torch.float64, device=device))
    loss, tokens = float(sums[0]), int(sums[1])
    mean = loss / max(tokens, 1)
    if not math.isfinite(mean):
        raise InputError(f"the loss on the evaluation batches is {mean}; the model is damaged.")
    return {
        "perplexity": {"all": math.exp(min(mean, 700.0)), "loss": mean, "tokens": tokens},
        "load": load_record(counts.take(sum_over_ranks)),
    }
