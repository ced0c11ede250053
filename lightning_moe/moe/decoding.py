"""The decoder alone: what the output head would be given, without the cost of the vocabulary."""

# B windows, S positions, H model width

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

DECODE = "lightning_moe_decode"
"""The method of a split model that gathers its weights as its forward does; calling a part of it would not."""


def decode(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the output head of ``model`` would be given, ``(B, S, H)``."""
    run: Callable[..., Tensor] = getattr(model, DECODE, None) or decoder_method(model)
    return run(input_ids, attention_mask)


def decoder_method(model: PreTrainedModel) -> Callable[..., Tensor]:
    def run(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    return run
