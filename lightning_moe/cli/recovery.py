"""Recovery: how a model is tuned after it lost experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.router_rebalance import RouterRebalance, Trained
from lightning_moe.cli.fitting import fit_steps
from lightning_moe.cli.step_saves import StepSaves
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.data.teacher_cache import TeacherCache
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.modules.router_distillation import RouterDistillation

Kind = Literal["finetune", "router-kd"]

MIXTRAL_PARAMETERS, MIXTRAL_LR = 46.7e9, 1e-6
"""What MC-Suite tunes, and its highest learning rate."""

ROUTER_KD_LR = 50.0
"""Router KD's learning rate (5e-5, arXiv 2603.02217) over that of fine-tuning at Mixtral's size."""

CLIP = 1.0
"""Largest norm of the gradients, where the Trainer has none set."""


def default_lr(parameters: int, kind: Kind = "finetune") -> float:
    """The paper's 1e-6 at Mixtral 8x7B's size, more for smaller models: by the power -2/3 of the parameters.

    The power is ours: it meets what the small reference models tune well at (a few 1e-4 at 7 million).
    """
    return (
        (ROUTER_KD_LR if kind == "router-kd" else 1.0) * MIXTRAL_LR * math.pow(MIXTRAL_PARAMETERS / parameters, 2 / 3)
    )


@dataclass(frozen=True)
class Recovery:
    """How a model is tuned between rounds.

    Args:
        kind: finetune, by next-token prediction; or router-kd: the routers alone, towards what the whole model said of
            the same text.
        batch_tokens: Tokens per optimiser step; default is one batch on every rank.
        train: What learns: all, routers, or routers+norms.
        load_balance: Weight of the load-balance loss.
        z_loss: Weight of the router z-loss.
        bias_step: Step of the correction biases of routers that have some (DeepSeek-V3), instead of that loss.
    """

    kind: Kind = "finetune"
    batch_tokens: int | None = None
    train: Trained = "all"
    load_balance: float = 0.01
    z_loss: float = 0.0
    bias_step: float = 0.001

    def check(self) -> None:
        """Raise ``InputError`` for what cannot be."""
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"--recovery.batch_tokens {self.batch_tokens}: at least 1.")
        routers = ("train", "load_balance", "z_loss", "bias_step")
        changed = [name for name in routers if getattr(self, name) != getattr(Recovery, name)]
        if self.kind == "router-kd" and changed:
            raise InputError(
                f"--recovery.{changed[0]} {getattr(self, changed[0])}: router-kd trains the routers alone, and only "
                "towards what the whole model said; leave it out."
            )
        self.rebalance()

    def rebalance(self) -> RouterRebalance:
        if self.kind == "router-kd":  # the teacher says where tokens go; nothing else does
            return RouterRebalance(0.0, 0.0, 0.0, train="routers")
        return RouterRebalance(self.load_balance, self.z_loss, self.bias_step, self.train)

    def batches_per_step(self, window: int, world_size: int, batch_size: int) -> int:
        """Batches on each rank until an optimiser step has ``batch_tokens``."""
        one = window * world_size * batch_size
        return 1 if self.batch_tokens is None else max(1, round(self.batch_tokens / one))


NEXT_TOKEN = Recovery()
"""Tuning as MC-Suite does it."""


@dataclass(frozen=True)
class Tuned:
    """What a round of tuning was."""

    steps: int
    tokens: int


def tune(
    trainer: Trainer,
    network: PreTrainedModel,
    data: TextDataModule,
    recovery: Recovery,
    tokens: int,
    lr: float,
    saves: StepSaves,
    teacher: TeacherCache | None = None,
    callbacks: Sequence[Callback] = (),
) -> Tuned:
    """Tune ``network`` in place on about ``tokens`` tokens, going on from the newest save if there is one."""
    data.setup("fit")
    window = data.text.tokens_NS.shape[1]
    batches = recovery.batches_per_step(window, trainer.world_size, data.batch_size)
    steps = max(1, round(tokens / (batches * window * trainer.world_size * data.batch_size)))
    settings: dict[str, Any] = {"lr": lr, "min_lr_ratio": 0.0, "weight_decay": 0.0}
    module = MoECausalLM(**settings) if teacher is None else RouterDistillation(teacher, **settings)
    module.adopt(network)
    count = TokenCount()
    fit_steps(trainer, module, data, steps, batches, saves, "step", [recovery.rebalance(), count, *callbacks], CLIP)
    return Tuned(steps, count.tokens)


class TokenCount(Callback):
    """Real tokens trained on, over all ranks."""

    def __init__(self) -> None:
        self.tokens = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.tokens += int(trainer.strategy.reduce(batch["attention_mask"].sum(), reduce_op="sum"))
