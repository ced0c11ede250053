"""Fits that save, and the law of exports beside checkpoints: each holds exactly the weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.callbacks.foreign_fit import Foreign, fit, loader, small_model


class Validated(Foreign):
    """Logs its loss, and validates."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val", float(self.current_epoch))


def fit_saving(folder: Path, *callbacks: Any, module: Any = None, batches: int = 4, **kwargs: Any) -> Any:
    """Four batches an epoch, two validated after each."""
    module = Validated(small_model()) if module is None else module
    fit(module, folder, *callbacks, data=loader(batches), val=loader(2), enable_checkpointing=True, **kwargs)
    return module


def saved_weights(file: Path) -> dict[str, Tensor]:
    """What Lightning's checkpoint holds of the model."""
    prefix = "wrapped.inner.0."
    state = torch.load(file, weights_only=False)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def assert_beside(folder: Path, *names: str) -> None:
    """These checkpoints, and beside each an export with exactly its weights; nothing else."""
    assert sorted(file.stem for file in folder.rglob("*.ckpt")) == sorted(names)
    assert sorted(export.name for export in folder.rglob("*-hf")) == sorted(f"{name}-hf" for name in names)
    assert len(list(folder.rglob(".*"))) == 0
    for file in folder.rglob("*.ckpt"):
        expected = saved_weights(file)
        found = AutoModelForCausalLM.from_pretrained(file.with_name(f"{file.stem}-hf")).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (file.name, name)
