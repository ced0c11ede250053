"""HFCheckpoint beside Lightning's checkpoints: each has an export of exactly its weights, which goes with it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_moe.callbacks.expert_pruning import ExpertPruning
from lightning_moe.callbacks.hf_checkpoint import HFCheckpoint
from lightning_moe.moe.layers import find_moe_layers
from tests.callbacks.export_fit import assert_beside, fit_saving, saved_weights
from tests.callbacks.foreign_fit import logits
from tests.helpers.checkpoint import save_tokenizer
from tests.helpers.families import tiny_batch

MOMENTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "each step": ({"every_n_train_steps": 1, "save_top_k": -1}, ["step=1", "step=2", "step=3", "step=4"]),
    "each second": ({"every_n_train_steps": 2, "save_top_k": -1}, ["step=2", "step=4"]),
    "each epoch's end": ({"save_on_train_epoch_end": True}, ["step=4"]),
    "each validation's end": ({"save_on_train_epoch_end": False}, ["step=4"]),
    "and the last": ({"every_n_train_steps": 3, "save_last": True, "save_top_k": -1}, ["step=3", "last"]),
    "a link": ({"every_n_train_steps": 3, "save_last": "link", "save_top_k": -1}, ["step=3", "last"]),
    "weights only": ({"every_n_train_steps": 3, "save_weights_only": True}, ["step=3"]),
}


@pytest.mark.parametrize(("moments", "names"), MOMENTS.values(), ids=MOMENTS)
def test_beside_each_checkpoint_its_weights(tmp_path: Path, moments: dict[str, Any], names: list[str]) -> None:
    """Those of the moment, though training goes on before the export is written."""
    fit_saving(tmp_path, HFCheckpoint(), ModelCheckpoint(tmp_path / "saved", filename="{step}", **moments))
    assert_beside(tmp_path / "saved", *names)


def test_two_that_save(tmp_path: Path) -> None:
    """In folders of their own, at moments of their own."""
    savers = [ModelCheckpoint(tmp_path / f"every-{n}", "{step}", every_n_train_steps=n, save_top_k=-1) for n in (2, 3)]
    fit_saving(tmp_path, HFCheckpoint(), *savers)
    assert_beside(tmp_path / "every-2", "step=2", "step=4")
    assert_beside(tmp_path / "every-3", "step=3")


def test_the_trainers_own_folder(tmp_path: Path) -> None:
    fit_saving(tmp_path, HFCheckpoint())
    assert_beside(tmp_path / "checkpoints", "epoch=0-step=4")


def test_an_export_goes_with_its_checkpoint(tmp_path: Path) -> None:
    """Two of the best stay; here the last are the best. What somebody else has put there stays."""
    saving = ModelCheckpoint(tmp_path / "saved", "{epoch}", monitor="val", mode="max", save_top_k=2)
    (tmp_path / "saved" / "theirs-hf").mkdir(parents=True)
    fit_saving(tmp_path, HFCheckpoint(), saving, max_epochs=4, batches=1)
    (tmp_path / "saved" / "theirs-hf").rmdir()
    assert_beside(tmp_path / "saved", "epoch=2", "epoch=3")


def test_the_last_is_exported_again_whenever_it_is_written(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            folder = tmp_path / "saved" / "last-hf"
            if folder.exists():
                seen.append(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.detach())

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=0, save_last=True)
    fit_saving(tmp_path, Look(), HFCheckpoint(), saving)
    assert_beside(tmp_path / "saved", "last")
    assert len(seen) == 3
    assert not any(torch.equal(left, right) for left, right in pairwise(seen))


def test_a_name_with_a_folder_in_it(tmp_path: Path) -> None:
    """Lightning makes one of each slash, as in the name of a metric."""
    fit_saving(
        tmp_path, HFCheckpoint(), ModelCheckpoint(tmp_path / "saved", "{step}-{train/loss:.1f}", every_n_train_steps=2)
    )
    (file,) = (tmp_path / "saved").rglob("*.ckpt")
    assert_beside(tmp_path / "saved", file.stem)


def test_a_folder_alone_is_for_the_end(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    module = fit_saving(tmp_path, HFCheckpoint(str(tmp_path / "out")), saving)
    assert not list((tmp_path / "saved").glob("*-hf"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(module.inner))


def test_both(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3)
    export = HFCheckpoint(str(tmp_path / "out"), str(tmp_path / "tokenizer"), "bfloat16", beside_checkpoints=True)
    fit_saving(tmp_path, export, saving)
    for folder in (tmp_path / "out", tmp_path / "saved" / "step=3-hf"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert (folder / "tokenizer.json").exists()


def test_an_older_checkpoint_gets_no_foreign_weights(tmp_path: Path) -> None:
    """One without an export, as a kill may leave it: what lies beside it later, if anything, is its own weights."""
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    fit_saving(tmp_path, saving)
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    fit_saving(tmp_path, HFCheckpoint(), saving)
    for export in (tmp_path / "saved").glob("*-hf"):
        expected = saved_weights(export.with_name(export.name.removesuffix("-hf") + ".ckpt"))
        found = AutoModelForCausalLM.from_pretrained(export).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "saved" / "step=3-hf").exists()


def test_a_checkpoint_of_somebody_else_gets_no_export(tmp_path: Path) -> None:
    """A fit may begin with what lies in no folder of its own."""
    fit_saving(tmp_path, ModelCheckpoint(tmp_path / "theirs", "{step}", every_n_train_steps=2))
    saving = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=4)
    theirs = tmp_path / "theirs" / "step=4.ckpt"
    fit_saving(tmp_path, HFCheckpoint(), saving, max_epochs=2, ckpt_path=theirs)
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["step=4.ckpt"]
    assert_beside(tmp_path / "saved", "step=8")


# --------------------------------------------------------------------------------- of a model being pruned


@pytest.mark.parametrize("unit", ["steps", "epochs"])
@pytest.mark.parametrize("pruned_first", [True, False])
@pytest.mark.parametrize("after", ["steps", "validation", "epochs"])
def test_each_moment_of_a_pruned_fit(tmp_path: Path, after: str, pruned_first: bool, unit: Any) -> None:
    """Stock transformers loads what was there when the checkpoint was written, with as many experts."""
    moments: dict[str, Any] = {"steps": {"every_n_train_steps": 1}, "validation": {}, "epochs": {}}[after]
    saving = ModelCheckpoint(
        tmp_path / "saved",
        "{step}",
        save_top_k=-1,
        save_on_train_epoch_end=None if after == "steps" else after == "epochs",
        **moments,
    )
    data = [{"input_ids": tiny_batch(2, 12)}]
    pruning = ExpertPruning(data, 0.5, [0.25, 0.5], "rwn", unit=unit, at=[1, 2] if unit == "epochs" else [2, 4])
    guests = [pruning, HFCheckpoint()] if pruned_first else [HFCheckpoint(), pruning]
    module = fit_saving(tmp_path, *guests, saving, max_epochs=3, batches=2)
    assert [layer.num_experts for layer in find_moe_layers(module)] == [4, 4]
    steps = [1, 2, 3, 4, 5, 6] if after == "steps" else [2, 4, 6]
    assert_beside(tmp_path / "saved", *(f"step={step}" for step in steps))
    for step in steps:
        config = json.loads((tmp_path / "saved" / f"step={step}-hf" / "config.json").read_text())
        assert config["num_local_experts"] in (4, 6, 8) and "per_layer_config" not in config
