"""Somebody's module that RouterRebalance is a guest in, the same with the losses added by hand, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.router_losses import gate_entropy_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, record_routing
from tests.callbacks.router_fit import loader, trainer
from tests.helpers.families import VOCAB
from tests.helpers.training_models import training_model


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us: the model lies deep inside, under its own names."""

    def __init__(self, model: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.head = nn.Linear(VOCAB, 3)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
        self.lr = lr

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        logits = self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.head(logits).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ByHand(Foreign):
    """The same step with the losses added where anybody would add them."""

    def __init__(self, model: PreTrainedModel, load_balance: float, z_loss: float = 0.0, entropy: float = 0.0) -> None:
        super().__init__(model)
        self.weights = {load_balance_loss: load_balance, router_z_loss: z_loss, gate_entropy_loss: entropy}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        routings: list[Routing] = []
        with record_routing(find_moe_layers(self.inner), lambda _, routing: routings.append(routing)):
            loss = super().training_step(batch, batch_idx)
        mask = batch.get("attention_mask")
        mask_T = None if mask is None else mask.flatten()
        for one, weight in self.weights.items():
            loss = loss + weight * sum(one(routing, mask_T) for routing in routings) / len(routings)
        return loss


class CountsBiases(Foreign):
    """Counts by hand in the first forward of each step, recomputing left out, and keeps the biases after each step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.counts: list[list[list[int]]] = []
        self.biases: list[list[Tensor]] = []

    def on_train_start(self) -> None:
        self.biases.append([bias.clone() for layer in find_moe_layers(self.inner) for bias in layer.correction_biases])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        routings: list[Routing] = []
        layers = find_moe_layers(self.inner)
        with record_routing(layers, lambda _, routing: routings.append(routing)):
            loss = super().training_step(batch, batch_idx)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        counted = []
        for layer, routing in zip(layers, routings, strict=True):
            count_E = [0] * layer.num_experts
            for real, ids in zip(mask, routing.expert_ids_TK.tolist(), strict=True):
                for expert in ids:
                    count_E[expert] += real
            counted.append(count_E)
        self.counts.append(counted)
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_train_start()


class Late(Foreign):
    """Makes its model in ``configure_model``, as sharded training asks for."""

    def __init__(self, family: str = "mixtral") -> None:
        super().__init__(nn.Identity())
        self.family = family

    def configure_model(self) -> None:
        if isinstance(self.inner, nn.Identity):
            self.wrapped["inner"][0] = training_model(self.family)  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.given = len(learning)
        return torch.optim.AdamW(learning, lr=0.01)


class Gradients(Callback):
    """Those of every optimiser step, as the optimiser gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in metrics if name.startswith("router_rebalance/")})


def gradients(folder: Path, module: Foreign, *callbacks: Callback, masked: bool = True, **kwargs: Any) -> Gradients:
    found = Gradients()
    trainer(folder, found, *callbacks, **kwargs).fit(module, loader(masked))
    return found


def assert_same(found: Gradients, expected: Gradients, rtol: float = 1e-4) -> None:
    assert len(found.steps) == len(expected.steps) > 0
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=rtol, atol=1e-6, msg=name)


def assert_differ(found: Gradients, expected: Gradients, model: PreTrainedModel) -> None:
    """In the first step, at every router."""
    for layer in find_moe_layers(model):
        name = next(name for name in found.steps[0] if name.endswith(f"{layer.name}.{_router_weight(layer)}"))
        assert not torch.allclose(found.steps[0][name], expected.steps[0][name], rtol=1e-2, atol=0), name


def _router_weight(layer: Any) -> str:
    own = next(name for name, module in layer.parts.block.named_modules() if module is layer.router)
    inner = next(name for name, parameter in layer.router.named_parameters() if parameter is layer.router_weight)
    return f"{own}.{inner}"
