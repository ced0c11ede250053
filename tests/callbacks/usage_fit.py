"""Somebody's module that counts by hand what its routers do, and the figures under which such counts are logged."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.stats.usage import load_figures, mean_load

Counts = dict[str, list[float]]


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us, and which we ask what its routers did in the first forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
        self.batches: list[tuple[str, Counts]] = []

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def run(self, batch: dict[str, Tensor], kind: str) -> Tensor:
        routings: dict[str, Routing] = {}
        with record_routing(find_moe_layers(self.inner), lambda layer, one: routings.update({layer.name: one})):
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            logits: Tensor = self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
        self.batches.append((kind, slow_counts(routings, mask)))
        return logits.float().square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.run(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.run(batch, "sanity" if self.trainer.sanity_checking else "val")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def slow_counts(routings: dict[str, Routing], mask: Tensor | None) -> Counts:
    """Tokens that each expert got, token by token."""
    counts: Counts = {}
    for name, routing in routings.items():
        ids = routing.expert_ids_TK.tolist()
        real = [1] * len(ids) if mask is None else mask.flatten().tolist()
        count_E = counts[name] = [0.0] * routing.logits_TE.shape[-1]
        for token, chosen in enumerate(ids):
            for expert in chosen:
                count_E[expert] += real[token]
    return counts


def summed(batches: list[tuple[str, Counts]], kind: str) -> Counts:
    counts = [counts for own, counts in batches if own == kind]
    return {name: [sum(column) for column in zip(*(one[name] for one in counts), strict=True)] for name in counts[0]}


def figures_of(counts: Counts, prefix: str) -> dict[str, float]:
    """The names under which a look is logged."""
    logged = {f"{prefix}/{name}": value for name, value in mean_load(counts).items()}
    for layer, count_E in counts.items():
        logged |= {f"{prefix}/{layer}/{name}": value for name, value in load_figures(count_E).items()}
    return logged
