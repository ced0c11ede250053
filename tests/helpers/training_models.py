"""Tiny models that are ready to be trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import tiny_model
from tests.helpers.plans import non_uniform_plan


def training_model(family: str = "mixtral", pruned: bool = False, recompute: bool = False) -> PreTrainedModel:
    model = tiny_model(family)
    if pruned:
        keep_experts(model, non_uniform_plan(model))
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
