"""Fits with importance logits, of modules that are not ours."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_moe.callbacks.importance_curve import ImportanceCurve

EXPERTS = (4, 6, 4)
FIGURES = {"curves", "distributions", "experts"}
STEPS = 6


class Gates(nn.Module):
    """Somebody's way to hold alpha and beta; layers differ in E."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.ParameterList([nn.Parameter(torch.zeros(count, dtype=dtype)) for count in EXPERTS])
        self.b = nn.Parameter(torch.ones(len(EXPERTS), dtype=dtype))

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {f"blocks.{10 * i}.moe": (alpha, self.b[i]) for i, alpha in enumerate(self.a)}


class Foreign(LightningModule):
    """Somebody's search, with an optimiser each for alpha and beta: Lightning counts two steps a batch."""

    def __init__(self, gates: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(2, 2), gates])
        self.targets = [torch.randn(count, generator=torch.Generator().manual_seed(count)) for count in EXPERTS]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        gates: Any = self.parts[1]
        loss = sum((alpha - target).square().sum() for alpha, target in zip(gates.a, self.targets, strict=True))
        loss = loss + (gates.b - torch.arange(len(EXPERTS))).square().sum()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        gates: Any = self.parts[1]
        return [torch.optim.SGD(gates.a.parameters(), lr=0.02), torch.optim.SGD([gates.b], lr=0.02)]


class Dense(LightningModule):
    """Has no importance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PlainOwner(Dense):
    """Offers the logits on the LightningModule itself."""

    def __init__(self, logits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.logits = logits

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return self.logits


class Planner(PlainOwner):
    """Knows the plan, too."""

    def kept_experts(self) -> Mapping[str, Sequence[int]]:
        return {name: [2, 0] for name in self.logits}


def fit(module: LightningModule, *callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"logger": False, "max_epochs": 1, "enable_checkpointing": False} | kwargs
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, DataLoader(torch.zeros(STEPS, 1)), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "importance.csv").open() as lines:
        return list(csv.DictReader(lines))


def assert_same(one: ImportanceCurve, other: ImportanceCurve) -> None:
    assert one.steps == other.steps
    assert one.betas == other.betas
    assert list(one.alphas) == list(other.alphas)
    assert all(torch.equal(one.alpha_SE(name), other.alpha_SE(name)) for name in one.alphas)
