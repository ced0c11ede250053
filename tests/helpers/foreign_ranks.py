"""Somebody's script: a LightningModule, a Trainer and ``moe_fsdp``, on as many processes as it is told.

Run as ``python -m tests.helpers.foreign_ranks JOB FOLDER DEVICES STRATEGY``; rank 0 writes what it found to
``FOLDER/JOB.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.moe.ranks import gathered, num_ranks, rank
from lightning_moe.moe.split_tensors import is_split, whole
from lightning_moe.strategies import MoEFSDPStrategy
from tests.helpers.families import tiny_batch, tiny_model

BATCH = 4


class Foreign(LightningModule):
    """It makes its model in ``configure_model``, as every module for a strategy of this kind does."""

    def __init__(self, by_hand: bool = False, **settings: Any) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.settings = settings
        self.inner: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.inner is None:
            self.inner = tiny_model("qwen2_moe", **self.settings).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss: Tensor = self.inner(input_ids=batch, labels=batch).loss
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        if self.automatic_optimization:
            return loss
        turn = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        self.manual_backward(loss)
        turn.step()
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.inner(input_ids=batch, labels=batch).loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        if self.automatic_optimization:
            return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)
        half = len(parameters) // 2
        return [torch.optim.SGD(parameters[:half], lr=0.1), torch.optim.SGD(parameters[half:], lr=0.1)]


class Stop(Callback):
    """Ends the fit with its first epoch, as a time limit does; a checkpoint is written before."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(self.file)
        trainer.should_stop = True


def batches(count: int, seed: int = 0) -> DataLoader[Any]:
    """This rank's part of batches that are the same on any number of ranks."""
    mine = [tiny_batch(BATCH, seed=seed + turn)[rank() :: num_ranks()] for turn in range(count)]
    return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]


class Data:
    """Loaders that are made once the ranks know each other."""

    def __init__(self, devices: int, strategy: Any, **trainer: Any) -> None:
        self.trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **{"max_steps": 4} | trainer,
        )

    def fit(self, module: Foreign, ckpt: Path | None = None, steps: int = 4) -> Foreign:
        from lightning.pytorch import LightningDataModule

        class Loaders(LightningDataModule):
            def train_dataloader(self) -> Any:
                return batches(steps)

            def val_dataloader(self) -> Any:
                return batches(1, seed=50)

        self.trainer.fit(module, datamodule=Loaders(), ckpt_path=ckpt, weights_only=False)
        return module


def figures(module: Foreign) -> dict[str, Any]:
    """Losses, sums of all weights as a whole, and whether what is not split is the same everywhere."""
    state = {name: whole(p.detach()).double() for name, p in module.named_parameters()}
    plain = [float(p.detach().double().sum()) for p in module.parameters() if not is_split(p)]
    return {
        "losses": module.losses,
        "weights": {name: [float(p.sum()), float(p.square().sum())] for name, p in state.items()},
        "alike": all(one == plain for one in gathered(plain)),
        "split": sum(is_split(p) for p in module.parameters()),
        "validated": float(module.trainer.callback_metrics.get("val", torch.nan)),
    }


def main() -> None:
    job, folder, devices, kind = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

    def strategy(**settings: Any) -> Any:
        return MoEFSDPStrategy(**settings) if kind == "moe_fsdp" else kind

    found: dict[str, Any] = {}
    found["automatic"] = figures(Data(devices, strategy()).fit(Foreign()))
    found["clipped"] = figures(Data(devices, strategy(), gradient_clip_val=0.05).fit(Foreign()))
    found["accumulated"] = figures(Data(devices, strategy(), accumulate_grad_batches=2, max_steps=2).fit(Foreign()))
    found["by_hand"] = figures(Data(devices, strategy()).fit(Foreign(by_hand=True)))
    found["two_epochs"] = figures(Data(devices, strategy()).fit(Foreign(), steps=2))
    found["mixed"] = figures(Data(devices, strategy(), precision="bf16-mixed").fit(Foreign()))
    if kind == "moe_fsdp":
        found["recomputed"] = figures(Data(devices, strategy(activation_checkpointing=True)).fit(Foreign()))
        for full in (False, True):
            settings = {"save_distributed_checkpoint": not full}
            file = folder / f"full-{full}.ckpt"
            Data(devices, strategy(**settings), callbacks=[Stop(file)]).fit(Foreign(), steps=2)
            assert file.is_file() == full
            again = Foreign()
            found[f"resumed-{full}"] = figures(Data(devices, strategy(**settings)).fit(again, file, steps=2))
        try:
            Data(devices, strategy()).fit(Foreign(num_experts=6), folder / "full-False.ckpt")
        except Exception as error:
            found["other_plan"] = [type(error).__name__, str(error)]
    if rank() == 0:
        (folder / f"{job}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
