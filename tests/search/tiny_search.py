"""Searches in tiny models: batches, a Trainer, and what became of alpha and beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_moe.modules.causal_lm import Batch, MoECausalLM
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.diep import DiEPSearch
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan


def wrapped(network: PreTrainedModel) -> MoECausalLM:
    """A model as ``MoECausalLM`` has it after loading: in training mode."""
    module = MoECausalLM()
    module.model = network.train()
    module.moe_layers = find_moe_layers(network)
    return module


def uneven_model(family: str) -> PreTrainedModel:
    """Layers of 4, 6, 4 ... experts."""
    model = tiny_model(family)
    keep_experts(model, non_uniform_plan(model))
    return model


def search_in(network: PreTrainedModel, **arguments: Any) -> DiEPSearch:
    """A search that is ready, with plain gradient descent unless said otherwise: no step hides a gradient's size."""
    search = DiEPSearch(wrapped(network), **({"optimizer": "sgd", "lr": 0.5} | arguments))
    search.configure_model()
    return search


def batch_of(ids_BS: Tensor, mask_BS: Tensor | None = None) -> Batch:
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS) if mask_BS is None else mask_BS}


def batches(count: int, rows: int = 2, length: int = 12) -> list[Batch]:
    return [batch_of(tiny_batch(rows, length, seed)) for seed in range(count)]


def fit(search: LightningModule, data: Sequence[Batch], *callbacks: Callback, **kwargs: Any) -> Trainer:
    """Search until its updates are made, over ``data`` again and again."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    settings: dict[str, Any] = {"max_steps": getattr(search, "updates", -1), "enable_checkpointing": False} | kwargs
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(search, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return trainer


def learned(search: DiEPSearch) -> list[Tensor]:
    """Copies of all alphas, and beta."""
    return [parameter.detach().clone() for parameter in (*search.importance.alphas, search.importance.beta_L)]


def randomize(search: DiEPSearch, seed: int = 0) -> None:
    """Somewhere away from the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in search.importance.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class History(Callback):
    """Alpha and beta after each batch, the losses logged with it, and the learning rate of each update."""

    def __init__(self) -> None:
        self.learned: list[list[Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiEPSearch)
        self.learned.append(learned(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert isinstance(pl_module, DiEPSearch)
        self.learned.append(learned(pl_module))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def moved(self) -> str:
        """``a`` where an update moved alphas, ``b`` where beta, ``x`` where both, ``-`` where nothing."""
        letters = ""
        for before, after in zip(self.learned, self.learned[1:], strict=False):
            changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
            letters += {(0, 0): "-", (1, 0): "a", (0, 1): "b", (1, 1): "x"}[any(changed[:-1]), changed[-1]]
        return letters
