"""Recovery: how a model is tuned after it lost experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.router_rebalance import RouterRebalance, Trained, wrong_setting
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

ROUTER_KD_LR = 5e-5
"""Router KD's learning rate (arXiv 2603.02217), for models of about that size."""

TUNING = {"min_lr_ratio": 0.0, "weight_decay": 0.0}
"""Beside the learning rate, what of ``MoECausalLM`` is not as in a fit."""

CLIP = 1.0
"""Largest norm of the gradients, where the Trainer has none set."""


def clipping(trainer: Trainer) -> dict[str, Any]:
    """How gradients are clipped, in plain values; nothing where it is as usual, so that runs of before go on."""
    largest, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return {
        **({} if largest in (None, CLIP) else {"gradient_clip_val": largest}),
        **({} if algorithm in (None, "norm") else {"gradient_clip_algorithm": algorithm.value}),
    }


def default_lr(parameters: int, kind: Kind = "finetune") -> float:
    """The paper's 1e-6 at Mixtral 8x7B's size, more for smaller models: by the power -2/3 of the parameters.

    For router-kd 5e-5, and the power -1/2. The powers are ours: they meet what the small reference models tune well at
    (4e-4 and 4e-3 at 7 million).
    """
    smaller = MIXTRAL_PARAMETERS / parameters
    if kind == "router-kd":
        return ROUTER_KD_LR * math.sqrt(smaller)
    return MIXTRAL_LR * math.pow(smaller, 2 / 3)


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
        entropy: Weight of the gate's entropy, from 0 (sure of one expert) to 1 (all alike): with load_balance 0 and
            bias_step 0, SEER-MoE's tuning.
    """

    kind: Kind = "finetune"
    batch_tokens: int | None = None
    train: Trained = "all"
    load_balance: float = 0.01
    z_loss: float = 0.0
    bias_step: float = 0.001
    entropy: float = 0.0

    def check(self) -> None:
        """Raise ``InputError`` for what cannot be."""
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"--recovery.batch_tokens {self.batch_tokens}: at least 1.")
        routers = ("train", "load_balance", "z_loss", "bias_step", "entropy")
        changed = [name for name in routers if getattr(self, name) != getattr(Recovery, name)]
        if self.kind == "router-kd" and changed:
            raise InputError(
                f"--recovery.{changed[0]} {getattr(self, changed[0])}: router-kd trains the routers alone, and only "
                "towards what the whole model said; leave it out."
            )
        wrong = wrong_setting(**{name: getattr(self, name) for name in routers})
        if wrong is not None:
            raise InputError(f"--recovery.{wrong}")

    def rebalance(self) -> RouterRebalance:
        if self.kind == "router-kd":  # the teacher says where tokens go; nothing else does
            return RouterRebalance(0.0, 0.0, 0.0, train="routers")
        return RouterRebalance(self.load_balance, self.z_loss, self.bias_step, self.train, self.entropy)

    def asked(self) -> dict[str, Any]:
        """In plain values; what came later only where it is given, so that runs of before go on."""
        return {name: value for name, value in vars(self).items() if name != "entropy" or value}

    def batches_per_step(self, window: int, world_size: int, batch_size: int) -> int:
        """Batches on each rank until a step has ``batch_tokens``. Raises ``InputError`` for less than one."""
        one = window * world_size * batch_size
        if self.batch_tokens is None:
            return 1
        if self.batch_tokens < one:
            raise InputError(
                f"--recovery.batch_tokens {self.batch_tokens}: one batch has {one} already ({batch_size} windows of "
                f"{window} tokens on each of {world_size} ranks); lower --data.batch_size."
            )
        return round(self.batch_tokens / one)


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
) -> Tuned:
    """Tune ``network`` in place on about ``tokens`` tokens, going on from the newest save if there is one."""
    data.setup("fit")
    window = data.text.tokens_NS.shape[1]
    batches = recovery.batches_per_step(window, trainer.world_size, data.batch_size)
    steps = max(1, round(tokens / (batches * window * trainer.world_size * data.batch_size)))
    settings: dict[str, Any] = {"lr": lr, **TUNING}
    module = MoECausalLM(**settings) if teacher is None else RouterDistillation(teacher, **settings)
    module.adopt(network)
    state = TuningState()
    torch.manual_seed(data.shuffle_seed)
    done = fit_steps(trainer, module, data, steps, batches, saves, "step", [recovery.rebalance(), state], CLIP)
    return Tuned(done, state.tokens)


class TuningState(Callback):
    """Real tokens trained on, over all ranks; and, for models with dropout or noisy routers, the state of chance."""

    def __init__(self) -> None:
        self.tokens = 0
        self._random: list[Tensor] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"tokens": self.tokens, "random": [torch.get_rng_state(), *on_devices]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self._random = state_dict["tokens"], state_dict["random"]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random:
            torch.set_rng_state(self._random[0].cpu())
        if len(self._random) > 1:
            torch.cuda.set_rng_state_all([state.cpu() for state in self._random[1:]])
        self._random = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.tokens += int(trainer.strategy.reduce(batch["attention_mask"].sum(), reduce_op="sum"))
