"""HFCheckpoint as a guest: any module's Hugging Face model becomes a folder that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe.callbacks.hf_checkpoint import HFCheckpoint
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from tests.callbacks.foreign_fit import Foreign, fit, logits
from tests.helpers.checkpoint import save_tokenizer
from tests.helpers.families import tiny_model


class Dense(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.before(torch.ones(1, 2)).sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_folder_holds_the_trained_model(tmp_path: Path, uniform: bool) -> None:
    model = tiny_model("mixtral")
    before = logits(model)
    names = [layer.name for layer in find_moe_layers(model)]
    if not uniform:
        keep_experts(model, {names[0]: [0, 2, 5], names[1]: [1, 2, 3, 4]})
    fit(Foreign(model), tmp_path, HFCheckpoint(str(tmp_path / "out")))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(saved), logits(model))
    assert not torch.equal(logits(saved), before)
    assert ("per_layer_config" in json.loads((tmp_path / "out" / "config.json").read_text())) == (not uniform)


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    fit(Foreign(tiny_model("mixtral")), tmp_path, HFCheckpoint(str(tmp_path / "out"), str(tmp_path / "tokenizer")))
    text = "A router picks two of eight experts."
    saved, own = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "tokenizer"))
    assert saved(text)["input_ids"] == own(text)["input_ids"]


def test_dtype_is_that_of_the_copy(tmp_path: Path) -> None:
    """What is saved is bfloat16; what was trained stays as it was."""
    model = tiny_model("mixtral")
    fit(Foreign(model), tmp_path, HFCheckpoint(str(tmp_path / "out"), dtype="bfloat16"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for (name, left), right in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(left.detach().bfloat16(), right), name


def test_a_later_export_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("old")
    fit(Foreign(tiny_model("mixtral")), tmp_path, HFCheckpoint(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


def test_a_fit_of_few_steps_is_saved(tmp_path: Path) -> None:
    fit(Foreign(tiny_model("mixtral")), tmp_path, HFCheckpoint(str(tmp_path / "out")), max_epochs=-1, max_steps=1)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("module", [Dense])
def test_no_model_inside_is_said_before_training(tmp_path: Path, module: type[Foreign]) -> None:
    """Not after the hours it takes."""
    steps: list[int] = []

    class Counting(module):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss

    with pytest.raises(TypeError, match="holds no Hugging Face model"):
        fit(Counting(nn.Identity()), tmp_path, HFCheckpoint(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    assert steps == []


@pytest.mark.parametrize("bad", [{"dtype": "bfloat15"}, {"tokenizer": "./nowhere"}])
def test_bad_arguments_are_said_before_training(tmp_path: Path, bad: dict[str, str]) -> None:
    """A misspelt option must not cost the trained model."""
    steps: list[int] = []

    class Counting(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises((ValueError, TypeError, OSError)):
        fit(Counting(tiny_model("mixtral")), tmp_path, HFCheckpoint(str(tmp_path / "out"), **bad))
    assert steps == []


def test_nothing_to_export_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to export"):
        HFCheckpoint(beside_checkpoints=False)


@pytest.mark.parametrize("beside", [None, True])
def test_a_fit_that_saves_nothing_exports_nothing(tmp_path: Path, beside: bool | None) -> None:
    fit(Foreign(tiny_model("mixtral")), tmp_path, HFCheckpoint(beside_checkpoints=beside))
    assert list(tmp_path.iterdir()) == []
