"""Settings of Trainer, model and text that a command with options of its own would pass over: they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM

LENGTHS = {"max_steps": -1, "max_epochs": None, "min_steps": None, "min_epochs": None}
"""How long the Trainer would fit, where nothing is said."""

TOKENS = "--finetune_tokens says how long to tune"
UPDATES = "a search says itself how many updates it takes (`search --updates`)"


def refuse_other_lengths(trainer: Trainer, data: TextDataModule, length: str) -> None:
    """Raise ``InputError`` for other words on how long to fit, and in what order; ``length`` is what says how long."""
    given = {name: getattr(trainer, name) for name, usual in LENGTHS.items() if getattr(trainer, name) != usual}
    # Of max_time the Trainer makes a callback; one that only measures has no end.
    timers = [one for one in trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
    seconds = [left for left in (one.time_remaining() for one in timers) if left is not None]
    given |= {"max_time": f"{seconds[0]:g} s"} if seconds else {}
    for name, value in given.items():
        raise InputError(f"--trainer.{name} {value}: {length}; leave it out.")
    if data.shuffle_seed:
        raise InputError(f"--data.shuffle_seed {data.shuffle_seed}: the order follows --seed_everything; leave it out.")


def refuse_other_tuning(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, tuning: Mapping[str, Any], lr_given: bool
) -> None:
    """Raise ``InputError`` for settings of ``fit`` that would not be those of the tuning.

    ``tuning`` is what the tuning gives the model's class. A learning rate of ``fit`` may stand where the tuning is
    given one of its own.
    """
    refuse_other_lengths(trainer, data, TOKENS)
    batches = trainer.accumulate_grad_batches
    if batches != 1:
        raise InputError(
            f"--trainer.accumulate_grad_batches {batches}: --recovery.batch_tokens says how many tokens a step takes; "
            "leave it out."
        )
    usual = {name: one.default for name, one in signature(MoECausalLM).parameters.items()}
    if model.lr != usual["lr"] and not lr_given:
        raise InputError(f"--model.lr {model.lr:g}: that of the tuning is --finetune_lr; give that instead.")
    for name in ("min_lr_ratio", "warmup_steps", "weight_decay", "betas"):
        value, used = getattr(model, name), tuning.get(name, usual[name])
        if value not in (usual[name], used):
            raise InputError(
                f"--model.{name} {value}: the tuning of rounds has {used}; leave it out, or tune the pruned model with "
                "`fit`."
            )
