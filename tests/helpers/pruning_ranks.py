"""Somebody's fit with our callbacks, which prunes, on as many processes as it is told.

``work(JOB, FOLDER, DEVICES, STRATEGY)`` on each; rank 0 writes what the callbacks recorded to ``FOLDER/JOB.json``, and
models to ``FOLDER/JOB-NAME``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

import lightning_moe.strategies  # noqa: F401 - registers moe_fsdp
from lightning_moe.callbacks import ExpertPruning, ExpertUsageMonitor, HFCheckpoint, RouterRebalance
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.ranks import num_ranks, rank
from tests.helpers.families import tiny_batch, tiny_model

BATCH, STEPS = 4, 6
CALIBRATION = [{"input_ids": tiny_batch(2, seed=100 + turn)} for turn in range(3)]
"""An odd number: one of two ranks has nothing left at the end."""


class Foreign(LightningModule):
    def __init__(self, family: str) -> None:
        super().__init__()
        self.family, self.inner = family, None
        self.losses: list[float] = []
        self.logits: Tensor | None = None

    def configure_model(self) -> None:
        if self.inner is None:
            self.inner = tiny_model(self.family).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.inner is not None
        loss: Tensor = self.inner(**batch, labels=batch["input_ids"]).loss
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        return loss

    def on_train_end(self) -> None:
        assert self.inner is not None
        with torch.no_grad():
            self.logits = self.inner.eval()(input_ids=tiny_batch(seed=7)).logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Rows:
    """Six batches in one epoch; a checkpoint knows how many were seen."""

    def __init__(self) -> None:
        self.done = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for turn in range(self.done, STEPS):
            self.done = turn + 1
            yield {"input_ids": tiny_batch(BATCH, seed=turn)[rank() :: num_ranks()]}

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Loaders(LightningDataModule):
    def train_dataloader(self) -> Any:
        return Rows()


class Stop(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == STEPS // 2:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def work(job: str, folder: Path, devices: int, strategy: str) -> None:
    found: dict[str, Any] = {}

    def fit(name: str, family: str, ckpt: Path | None = None, stop: Path | None = None, **settings: Any) -> None:
        arguments: dict[str, Any] = {"ratio": 0.5, "rounds": 2, "start": 1, "every": 3, "method": "ean"} | settings
        pruning = ExpertPruning(CALIBRATION, evaluation=CALIBRATION, **arguments)
        usage = ExpertUsageMonitor(every_n_steps=1)
        target = folder / f"{job}-{name}"
        guests = [pruning, RouterRebalance(0.01, 0.001, bias_step=0.01), usage, HFCheckpoint(str(target))]
        module = Foreign(family)
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[*guests, *([Stop(stop)] if stop else [])],
        )
        trainer.fit(module, datamodule=Loaders(), ckpt_path=ckpt, weights_only=False)
        assert module.logits is not None
        found[name] = {
            "records": [asdict(record) for record in pruning.records],
            "losses": module.losses,
            "usage": usage.last,
            "logits": module.logits[0, -1, :5].tolist(),
            "left": [layer.shape.num_experts for layer in find_moe_layers(module)],
        }
        if rank() == 0:
            torch.save(module.logits, folder / f"{job}-{name}.pt")

    fit("layer", "mixtral")
    fit("global", "qwen2_moe", scope="global", method="reap", optimizer="carry")
    fit("biased", "ernie4_5_moe", rounds=1)
    fit("search", "mixtral", method="diep", rounds=1)
    fit("random", "olmoe", method="random", rounds=[0.25, 0.5])
    fit("stopped", "mixtral", stop=folder / f"{job}.ckpt")
    fit("resumed", "mixtral", ckpt=folder / f"{job}.ckpt")
    if rank() == 0:
        (folder / f"{job}.json").write_text(json.dumps(found))
