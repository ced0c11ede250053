"""Rounds of ``prune`` on the tiny checkpoint: how they are asked for, what they wrote, and what they were tuned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.pruning.round_record import RoundRecord, read_records
from tests.helpers.checkpoint import Commands

LAYERS = [f"model.layers.{index}.mlp" for index in range(2)]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN, BATCH_SIZE, VAL_SAMPLES = 16, 2, 6
TOKENS = 4 * SEQ_LEN
TUNED = ("--rounds", 2, "--finetune_tokens", TOKENS)
ITERATIVE = ("--rounds", 2)
ROUTER_KD = ("--rounds", 2, "--finetune_tokens", 8 * SEQ_LEN, "--recovery.kind", "router-kd")


def model_args(checkpoint: Path) -> list[object]:
    return [*QUIET, "--model.path", checkpoint]


def text_args(text: Path) -> list[object]:
    """Windows of one file to calibrate and tune on, of the other to measure."""
    calibration = ["--data.path", text / "harbour.txt", "--data.seq_len", SEQ_LEN, "--data.samples", 8]
    validation = ["--data.val_path", text / "island.txt", "--data.val_samples", VAL_SAMPLES]
    return [*calibration, *validation, "--data.batch_size", BATCH_SIZE]


def prune_args(checkpoint: Path, text: Path, *more: object) -> list[object]:
    return ["prune", *model_args(checkpoint), *text_args(text), "--method", "ean", *more]


def records_of(folder: Path) -> list[RoundRecord]:
    return read_records(folder / "rounds.jsonl")


def tensors(folder: Path) -> dict[str, Tensor]:
    """The weights on disk, whatever files they lie in."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loaded(folder: Path, **kwargs: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return model


def cut_by_plan(run: Commands, checkpoint: Path, folder: Path, out: Path) -> Path:
    """The checkpoint as ``prune --plan`` cuts it."""
    run.ok("prune", *model_args(checkpoint), "--plan", folder / "plan.json", "--out", out)
    return out / "model"


class Trained:
    """The windows that each batch of tuning saw, by the text's own numbers, and the types of the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[list[int]] = []
        self.tokens: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        stock = MoECausalLM.training_step

        def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.windows.append(batch["window"].tolist())
            self.tokens += list(batch["input_ids"])
            self.dtypes |= {parameter.dtype for parameter in module.parameters()}
            return stock(module, batch, batch_idx)

        monkeypatch.setattr(MoECausalLM, "training_step", step)
