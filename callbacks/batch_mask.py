"""What a guest needs to know of anybody's batch: which tokens are real, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def batch_mask(batch: Any) -> Tensor | None:
    """The attention mask of a batch that is a mapping with one, else None: all tokens count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def num_tokens(batch: Any, asker: str) -> int:
    """Real tokens of a batch: of its mask, or of its ``input_ids``, or of the tensor of ids that it is."""
    mask = batch_mask(batch)
    if mask is not None:
        return int(torch.count_nonzero(mask))
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        return ids.numel()
    raise TypeError(f"{asker}: to count tokens, batches must be mappings with `input_ids`, or tensors of token ids.")
