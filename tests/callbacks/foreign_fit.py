"""Somebody's module, data and Trainer, for fits in which experts are pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_moe.callbacks.expert_pruning import ExpertPruning
from lightning_moe.moe.layers import find_moe_layers
from tests.helpers.families import tiny_batch, tiny_model

ROWS, LENGTH = 2, 12
TOKENS = ROWS * LENGTH
"""Of one batch."""


class Killed(RuntimeError):
    """What a signal, a full disk or a power cut does to a fit."""


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us: the model lies deep inside, under its own names.

    ``optimizer`` makes one of the parameters, ``scheduler`` one of the optimiser; ``kill_at`` is the batch, counted
    over the epochs, whose training step raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        interval: str = "step",
        kill_at: int | None = None,
    ) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        self.make_scheduler, self.interval = scheduler, interval
        self.kill_at = kill_at
        self.losses: list[float] = []

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.total_batch_idx == self.kill_at:
            raise Killed
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        loss: Tensor = self.inner(input_ids=ids, attention_mask=mask, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.inner.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": self.interval}]


class Batches(list[dict[str, Tensor]]):
    """Batches of ids alone, of ``ROWS`` rows; the same for the same seed."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__({"input_ids": tiny_batch(ROWS, LENGTH, 100 * seed + number)} for number in range(count))


class ByNumber(Foreign):
    """A fit that goes on reads a plain DataLoader from its start again; this module takes each batch by its number."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(Batches(batch_idx + 1)[-1], batch_idx)


def loader(count: int, seed: int = 0) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Batches(count, seed), batch_size=None)  # type: ignore[arg-type]


def calibration() -> DataLoader[dict[str, Tensor]]:
    return loader(3, seed=7)


def still(parameters: Any) -> torch.optim.Optimizer:
    """An optimiser that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def small_model(family: str = "mixtral") -> PreTrainedModel:
    """Ready to be trained; its experts are narrow, since a round looks at their spectra."""
    return tiny_model(family, **({"intermediate_size": 8} if family == "mixtral" else {})).train()


def fit(
    module: LightningModule,
    folder: Path,
    *callbacks: Callback,
    data: Any = None,
    val: Any = None,
    ckpt_path: Path | str | None = None,
    **kwargs: Any,
) -> Trainer:
    """Train, for six batches unless said otherwise."""
    checkpoints = any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks)
    settings: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": checkpoints} | kwargs
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, loader(6) if data is None else data, val, ckpt_path=ckpt_path)
    return trainer


class Look(Callback):
    """Calls ``look(trainer, module)`` at the end of every batch, before or after what lies beside it in the list."""

    def __init__(self, look: Callable[[Trainer, Any], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.look(trainer, pl_module))


def counts(model: nn.Module) -> list[int]:
    return [layer.num_experts for layer in find_moe_layers(model)]


def steps_of(pruning: ExpertPruning) -> list[int]:
    """Optimiser steps before each round."""
    return [record.made_by["step"] for record in pruning.records]


def assert_rows_of(model: nn.Module, whole: dict[str, Tensor], keep: dict[str, Sequence[int]]) -> None:
    """Every tensor is the one in ``whole``, or the slices of it that its layer keeps, bit by bit."""
    cut = 0
    for name, tensor in model.state_dict().items():
        expected = whole[name]
        if tensor.shape != expected.shape:
            (layer,) = (layer for layer in keep if name.startswith(f"{layer}."))
            (dimension,) = (d for d, size in enumerate(tensor.shape) if size != expected.shape[d])
            expected = expected.index_select(dimension, torch.tensor(keep[layer]))
            cut += 1
        assert torch.equal(tensor, expected), name
    assert cut >= 3 * sum(len(ids) < 8 for ids in keep.values())  # router and two stacks, at the least


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tiny_batch()).logits
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
