"""ExpertPruning where a strategy wraps the model or splits it: all is as on a process of its own, kills included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_moe.strategies  # noqa: F401 - registers moe_fsdp
from lightning_moe.callbacks import ExpertPruning, HFCheckpoint
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.pruning.round_record import read_records
from tests.callbacks.foreign_fit import (
    ByNumber,
    Foreign,
    Killed,
    calibration,
    counts,
    fit,
    loader,
    logits,
    small_model,
    steps_of,
)

SHARED = ["ddp_find_unused_parameters_true", "moe_fsdp"]
"""Strategies for several processes; here each is alone with itself, which changes nothing in how it holds a model."""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, started as torchrun starts several."""
    found = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "tests"}
    for name, value in found.items():
        monkeypatch.setenv(name, str(value))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Measured(ByNumber):
    """Validated, and trained by what forgives rounding."""

    def __init__(self, kill_at: int | None = None, family: str = "mixtral") -> None:
        super().__init__(small_model(family), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), kill_at=kill_at)

    def configure_model(self) -> None:
        """The model is there; moe_fsdp asks for this method."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("loss", self.inner(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)


def pruning(**settings: Any) -> ExpertPruning:
    return ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", start=1, **({"every": 2} | settings))


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)


def saved(folder: Path, step: int) -> dict[str, Any]:
    return {"ckpt_path": folder / "saved" / f"step={step}.ckpt"}


def left(module: Foreign) -> list[int]:
    return [layer.shape.num_experts for layer in find_moe_layers(module.inner)]


def exported(folder: Path) -> int:
    count: int = json.loads((folder / "config.json").read_text())["num_local_experts"]
    return count


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
@pytest.mark.parametrize("strategy", SHARED)
def test_one_device_is_no_other_case(tmp_path: Path, strategy: str, optimizer: Any) -> None:
    """What holds the weights decides, not how many processes there are."""
    fits, losses = [], []
    for name in ("auto", strategy):
        module, mine = Measured(), pruning(optimizer=optimizer)
        fit(module, tmp_path, mine, strategy=name)
        fits.append((mine.keep, steps_of(mine), left(module)))
        losses.append(module.losses)
    assert fits[0] == fits[1]
    assert fits[0][2] == [4, 4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("strategy", ["auto", *SHARED])
def test_with_no_step_left_the_export_stays_pruned(tmp_path: Path, strategy: str) -> None:
    """Lightning then starts no training, but exports are made of what it loaded; the last record is as ever."""
    evaluation = {"evaluation": loader(1, seed=9)}
    whole = pruning(**evaluation)
    fit(Measured(), tmp_path, whole, HFCheckpoint(str(tmp_path / "whole")), saver(tmp_path), strategy=strategy)
    again = pruning(**evaluation, folder=tmp_path / "records")
    export = HFCheckpoint(str(tmp_path / "again"))
    fit(Measured(), tmp_path, again, export, max_steps=6, strategy=strategy, **saved(tmp_path, 6))
    assert again.records == read_records(tmp_path / "records" / "rounds.jsonl") == whole.records
    assert again.records[-1].steps == 3 and "after_finetune" in again.records[-1].perplexity
    assert exported(tmp_path / "whole") == exported(tmp_path / "again") == 4
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert first == second


@pytest.mark.parametrize(("strategy", "loop"), [("auto", "test"), *((name, "validate") for name in SHARED)])
def test_other_loops_measure_the_pruned_model(tmp_path: Path, strategy: str, loop: str) -> None:
    """Of each checkpoint, in a new process as it were, and in that of the fit, which has dropped more since."""

    class Tested(Measured):
        test_step = Measured.validation_step

    def measured(module: Measured, **kwargs: Any) -> float:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            callbacks=[pruning()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        return float(getattr(trainer, loop)(module, loader(1, seed=5), verbose=False, **kwargs)[0]["loss"])

    for step in (2, 4):
        module = Tested()
        trainer = fit(module, tmp_path, pruning(), saver(tmp_path), strategy=strategy, max_steps=step)
        found = getattr(trainer, loop)(module, loader(1, seed=5), verbose=False)[0]["loss"]
        assert left(module) == [8 - step] * 2
        fresh = Tested()
        assert measured(fresh, **saved(tmp_path, step)) == pytest.approx(found, rel=1e-5)
        assert left(fresh) == [8 - step] * 2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_an_earlier_checkpoint_brings_masked_experts_back(tmp_path: Path, family: str) -> None:
    """In the process that has dropped more since; correction biases are the checkpoint's."""
    strategy = SHARED[0]
    module = Measured(family=family)
    trainer = fit(module, tmp_path, pruning(), saver(tmp_path), strategy=strategy)
    assert left(module) == [4, 4]
    trainer.validate(module, loader(1), verbose=False, **saved(tmp_path, 2))
    fresh = Measured(family=family)
    fit(fresh, tmp_path, pruning(), max_steps=2, strategy=strategy, **saved(tmp_path, 2))
    assert left(module) == left(fresh) == [6, 6]
    assert torch.equal(logits(module.inner), logits(fresh.inner))


def test_a_cut_model_loads_no_earlier_checkpoint(tmp_path: Path) -> None:
    module = Measured()
    trainer = fit(module, tmp_path, pruning(), saver(tmp_path))
    with pytest.raises(InputError, match=r"has 4 experts, its checkpoint 6; load it into a new model"):
        trainer.validate(module, loader(1), verbose=False, **saved(tmp_path, 2))


@pytest.mark.parametrize(("optimizer", "step"), [("carry", 2), ("reset", 4)])
@pytest.mark.parametrize(("first", "second"), [("auto", SHARED[0]), (SHARED[0], "auto")], ids=["wrapped", "unwrapped"])
def test_a_fit_goes_on_under_another_strategy(
    tmp_path: Path, first: str, second: str, optimizer: Any, step: int
) -> None:
    """Weights stay as the checkpoint has them, cut or whole; what comes of it is the same."""
    whole = Measured(), pruning(optimizer=optimizer)
    fit(whole[0], tmp_path, whole[1])
    with pytest.raises(Killed):
        fit(Measured(kill_at=4), tmp_path, pruning(optimizer=optimizer), saver(tmp_path), strategy=first)
    again = Measured(), pruning(optimizer=optimizer)
    fit(again[0], tmp_path, again[1], strategy=second, **saved(tmp_path, step))
    assert again[1].keep == whole[1].keep
    assert [record.steps for record in again[1].records] == [record.steps for record in whole[1].records]
    assert again[0].losses == pytest.approx(whole[0].losses[step:], rel=1e-4)
    held = {2: 6, 4: 4}[step] if first == "auto" else 8
    assert (left(again[0]), counts(again[0].inner)) == ([4, 4], [held] * 2)


def test_what_is_split_takes_no_cut_weights(tmp_path: Path) -> None:
    """Its parts are made before it loads."""
    fit(Measured(), tmp_path, pruning(), saver(tmp_path))
    with pytest.raises(InputError, match="a checkpoint of another plan") as refused:
        fit(Measured(), tmp_path, pruning(), strategy="moe_fsdp", **saved(tmp_path, 2))
    assert "\n" not in str(refused.value)
