"""What a guest needs of anybody's batches: where they are, which tokens are real, and how many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.ranks import on_all_ranks

Batches = LightningDataModule | Iterable[Any]
"""A DataLoader or anything like it, or a datamodule, whose predict loader is used, or else its validation loader."""


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


def prepare(sources: Iterable[Batches | None], trainer: Trainer) -> None:
    """Let datamodules prepare their data as a fit's own does: once on each node, or once in all; others wait for it.

    All ranks must call it. The Trainer's own has been prepared.
    """
    for source in {id(one): one for one in sources}.values():
        own = source is trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(source, LightningDataModule) and not own:
            first = trainer.local_rank == 0 and (source.prepare_data_per_node or trainer.node_rank == 0)
            on_all_ranks(source.prepare_data if first else lambda: None)


def batches_of(source: Batches) -> Iterable[Any]:
    """The batches of a loader or a datamodule, which is prepared."""
    if not isinstance(source, LightningDataModule):
        return source
    for stage, name in (("predict", "predict_dataloader"), ("validate", "val_dataloader")):
        if getattr(type(source), name) is not getattr(LightningDataModule, name):
            source.setup(stage)
            loader: Iterable[Any] = getattr(source, name)()
            return loader
    raise InputError(f"{type(source).__name__} has neither a predict nor a validation loader.")
