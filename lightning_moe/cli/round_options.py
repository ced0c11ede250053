"""RoundOptions: the options of ``prune`` and ``compare`` that make rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_moe.cli.recovery import TUNING, Recovery, default_lr
from lightning_moe.cli.request import model_path, refuse_less_text
from lightning_moe.cli.unheeded import refuse_other_tuning
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.data.text import content_fingerprint
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import read_config
from lightning_moe.pruning.schedule import RoundSchedule, Spacing, make_schedule

HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RoundOptions:
    """The options of ``prune`` and ``compare`` that make rounds."""

    rounds: int | Sequence[float] = 1
    spacing: Spacing = "equal"
    tokens: int = 0
    growth: float = 2.0
    tune_path: str | None = None
    lr: float | None = None
    """Highest learning rate of the tuning; None is the default of the model's size."""
    recovery: Recovery = field(default_factory=Recovery)

    @property
    def asked_for(self) -> bool:
        """Whether there is more to do than one cut."""
        return self.rounds != 1 or self.tokens > 0

    def schedule(self, ratio: float) -> RoundSchedule:
        return make_schedule(ratio, self.rounds, self.spacing, self.tokens, self.growth)

    def check(self) -> None:
        """Raise ``InputError`` for options that contradict each other."""
        self.recovery.check()
        if self.tokens < 0:
            raise InputError(f"--finetune_tokens {self.tokens}: 0 or more.")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"--finetune_lr {self.lr}: above 0.")
        if not isinstance(self.rounds, int) and self.spacing != "equal":
            raise InputError(f"--spacing {self.spacing}: the list of --rounds says already how they are spaced.")
        if not self.tokens and self.growth != RoundOptions.growth:
            raise InputError(f"--finetune_growth {self.growth}: without --finetune_tokens there is no tuning to grow.")
        if not self.tokens and (self.recovery != Recovery() or self.tune_path is not None or self.lr is not None):
            raise InputError(
                "--finetune_... and --recovery... say how to tune after each round, but without --finetune_tokens "
                "there is no tuning. Give it, or leave them out."
            )

    def check_text(self, data: TextDataModule, tokens: int, world_size: int) -> None:
        """Raise ``InputError`` when the text to tune on is not there, or does not go with the size of a step."""
        text = data.training(self.tune_path, tokens, 0, world_size)
        text.check_training(world_size)
        self.recovery.batches_per_step(text.text.tokens_NS.shape[1], world_size, data.batch_size)

    def lr_of(self, parameters: int) -> float:
        """The learning rate asked for, or the default of a model of this size."""
        return default_lr(parameters, self.recovery.kind) if self.lr is None else self.lr

    def asked(self) -> dict[str, Any]:
        """In plain values: equal ones are the same work."""
        return {
            "rounds": self.rounds if isinstance(self.rounds, int) else list(self.rounds),
            "spacing": self.spacing,
            "finetune_tokens": self.tokens,
            **({"finetune.growth": self.growth} | self.asked_tuning() if self.tokens else {}),
        }

    def asked_tuning(self) -> dict[str, Any]:
        """What tuning is, its schedule aside."""
        tuning: dict[str, Any] = {"lr": self.lr} | self.recovery.asked()
        tuning["content"] = None if self.tune_path is None else content_fingerprint(self.tune_path) or self.tune_path
        return {f"finetune.{name}": value for name, value in tuning.items()}


def prepare_tuning(trainer: Trainer, model: MoECausalLM, data: TextDataModule, options: RoundOptions) -> None:
    """See that steps of tuning are not lost: weights stored in 16 bits are loaded as float32.

    Where only routers learn (and norms), the rest may stay in 16 bits: what learns is held in float32. Raises
    ``InputError`` where 16 bits would be trained, for a quantised model, and for settings that tuning would pass over.
    """
    recovery = options.recovery
    refuse_other_tuning(trainer, model, data, TUNING, options.lr is not None)
    refuse_less_text(trainer, "limit_train_batches")
    if trainer.precision.endswith("-true") and not trainer.precision.startswith(("32", "64")):
        raise InputError(
            f"--trainer.precision {trainer.precision}: the small steps of tuning vanish in 16 bits; give bf16-mixed."
        )
    if getattr(trainer.strategy, "quantize", None):
        raise InputError("moe_fsdp: quantize is for what does not tune, which would change what is packed.")
    partly = recovery.kind == "router-kd" or recovery.train != "all"
    if model.dtype_name in ("bfloat16", "float16") and not (partly and trainer.precision == "bf16-mixed"):
        raise InputError(
            f"--model.dtype {model.dtype_name}: the small steps of tuning vanish in 16 bits; leave it out, or tune "
            "routers alone (--recovery.train routers+norms) with --trainer.precision bf16-mixed. Weights are saved in "
            "the type they came in."
        )
    if model.dtype_name == "auto" and read_config(model_path(model)).dtype in HALF_PRECISION:
        model.dtype_name = "float32"
