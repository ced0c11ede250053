"""Somebody's LightningModules, which know nothing of us: of one model, of one with a head, of several."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_moe.moe.ranks import num_ranks, rank
from tests.helpers.families import HIDDEN, VOCAB, tiny_model


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

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.inner(input_ids=batch, labels=batch).loss
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
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

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        if self.automatic_optimization:
            return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)
        half = len(parameters) // 2
        return [torch.optim.SGD(parameters[:half], lr=0.1), torch.optim.SGD(parameters[half:], lr=0.1)]


class Toggling(Foreign):
    """By hand, as adversarial models are trained: only the parameters whose turn it is learn, clipped."""

    def __init__(self) -> None:
        super().__init__(by_hand=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        turn = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        self.toggle_optimizer(turn)
        turn.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(turn, 0.3, "norm")
        turn.step()
        self.untoggle_optimizer(turn)


class Headed(Foreign):
    """A model that is there from the start, random numbers in it and all, with a head of its own and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("qwen2_moe", seed=rank_from_launcher()).train()
        self.inner.get_input_embeddings().requires_grad_(False)
        self.head = nn.Linear(HIDDEN, 3)

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.inner(input_ids=batch, output_hidden_states=True).hidden_states[-1]
        return super().loss(batch) + self.head(hidden).square().mean()


class Parted(Headed):
    """Each rank uses a head of its own, as where text decides which part of a model learns."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, 3) for _ in range(3))  # nobody uses the third
        self.seen: list[list[float]] = []

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.inner(input_ids=batch, output_hidden_states=True).hidden_states[-1]
        parts = [hidden] if num_ranks() == 2 else [hidden[turn::2] for turn in range(2)]
        heads = [self.heads[rank()]] if num_ranks() == 2 else self.heads[:2]
        own = [head(part).square().mean() for head, part in zip(heads, parts, strict=True)]
        return Foreign.loss(self, batch) + torch.stack(own).mean()

    def on_after_backward(self) -> None:
        assert self.heads[2].weight.grad is None
        gradients = [head.weight.grad for head in self.heads[:2]]
        self.seen.append([float(gradient.double().sum()) for gradient in gradients if gradient is not None])


class Taught(Foreign):
    """Three Hugging Face models: a dense one that learns too, the MoE, and another MoE whose logits it follows."""

    def configure_model(self) -> None:
        if self.inner is None:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_key_value_heads=2, **sizes)
            torch.manual_seed(rank_from_launcher())
            self.dense = AutoModelForCausalLM.from_config(config)
            super().configure_model()
            self.teacher = tiny_model("mixtral", seed=1).requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(input_ids=batch).logits
        told = self.inner(input_ids=batch).logits
        return super().loss(batch) + self.dense(input_ids=batch, labels=batch).loss + (told - taught).square().mean()


def rank_from_launcher() -> int:
    """Before the ranks know each other."""
    return int(os.environ.get("LOCAL_RANK", "0"))
