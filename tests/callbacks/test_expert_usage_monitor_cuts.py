"""ExpertUsageMonitor where experts are dropped in the midst of a fit: a window ends there, cut or masked alike."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.callbacks.expert_pruning import ExpertPruning
from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.surgery import keep_experts
from tests.callbacks.router_fit import LENGTH, STEPS, loader, trainer
from tests.callbacks.usage_fit import Counts, Foreign, summed
from tests.helpers.families import TOP_K, tiny_batch
from tests.helpers.training_models import training_model

KEEP = {"model.layers.0.mlp": [1, 2, 4, 7], "model.layers.1.mlp": list(range(8))}
"""The second layer is spared, as by a round of global scope."""


class Still(Foreign):
    """Learns nothing: what is cut and what is masked stay the same model."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Drops(Callback):
    """Takes the experts out of ``KEEP`` after a step, or at the end of an epoch."""

    def __init__(self, masked: bool, step: int | None = None, epoch: int | None = None) -> None:
        self.masked, self.step, self.epoch = masked, step, epoch
        self.masks = ExitStack()

    def drop(self, module: Any) -> None:
        if self.masked:
            self.masks.enter_context(mask_plan(find_moe_layers(module.inner), KEEP))
        else:
            keep_experts(module.inner, KEEP)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            self.drop(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.drop(pl_module)


def watched(folder: Path, first: bool, drops: Drops, every: int, *others: Callback, **kwargs: Any) -> Any:
    """Two epochs of four steps, the monitor before what drops experts or after it."""
    monitor, module = ExpertUsageMonitor(every_n_steps=every), Still(training_model())
    guests = [monitor, drops] if first else [drops, monitor]
    run = trainer(folder, *guests, *others, max_epochs=2, enable_checkpointing=bool(others))
    run.fit(module, loader(), **kwargs)
    return monitor, module


def left(counts: Counts) -> Counts:
    """Of counts of the smaller model, which of a masked one are those of all experts."""
    return {
        name: [count_E[i] for i in KEEP[name]] if len(count_E) > len(KEEP[name]) else count_E
        for name, count_E in counts.items()
    }


ORDERS = pytest.mark.parametrize("first", [True, False], ids=["before it", "after it"])
KINDS = pytest.mark.parametrize("masked", [False, True], ids=["cut", "masked"])


@ORDERS
@KINDS
def test_a_window_ends_where_experts_are_dropped(tmp_path: Path, masked: bool, first: bool) -> None:
    """No token is lost, and each look is at one model, in the layers that are spared too."""
    monitor, module = watched(tmp_path, first, Drops(masked, step=3), 4)
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", 3), ("train", 7)]
    assert monitor.looks[0][2] == summed(module.batches[:3], "train")
    assert monitor.looks[1][2] == left(summed(module.batches[3:7], "train"))
    assert [len(count_E) for count_E in monitor.last.values()] == [4, 8]
    tokens = STEPS * (2 * LENGTH - 5)
    assert all(sum(count_E) == TOP_K * tokens for count_E in monitor.last.values())


@ORDERS
def test_cut_or_masked_is_the_same(tmp_path: Path, first: bool) -> None:
    looks = [watched(tmp_path, first, Drops(masked, step=2), 3)[0].looks for masked in (False, True)]
    assert looks[0] == looks[1]


@ORDERS
@KINDS
@pytest.mark.parametrize("epoch", [0, 1], ids=["midst", "end"])
def test_at_the_end_of_an_epoch(tmp_path: Path, epoch: int, masked: bool, first: bool) -> None:
    """Also where nothing is trained on after it; the validation before it is no part of the window."""
    monitor, module = watched(tmp_path, first, Drops(masked, epoch=epoch), 100, val_dataloaders=loader(seed=1))
    training = [one for one in module.batches if one[0] == "train"]
    seen = [(kind, step) for kind, step, _ in monitor.looks]
    assert seen == [("val", 4), ("train", 4), ("val", 8)] if epoch == 0 else [("val", 4), ("val", 8), ("train", 8)]
    (look,) = (counts for kind, _, counts in monitor.looks if kind == "train")
    assert look == summed(training[: STEPS * (epoch + 1)], "train")


def test_dropped_before_a_validation_in_the_same_step(tmp_path: Path) -> None:
    """Looks lie in the order of what they saw."""
    monitor, module = ExpertUsageMonitor(every_n_steps=100), Still(training_model())
    run = trainer(tmp_path, monitor, Drops(False, step=2), val_check_interval=2)
    run.fit(module, loader(), loader(seed=1))
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", 2), ("val", 2), ("val", 4)]
    assert [len(look["model.layers.0.mlp"]) for _, _, look in monitor.looks] == [8, 4, 4]


@ORDERS
@KINDS
def test_a_fit_resumed_at_the_cut_has_the_looks_of_one_run(tmp_path: Path, masked: bool, first: bool) -> None:
    """The look is in the checkpoint of the very step, on whichever side of the cut the monitor stands."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, _ = watched(tmp_path, first, Drops(masked, step=3), 4, saving)
    module, monitor = Still(training_model()), ExpertUsageMonitor(every_n_steps=4)
    drops = Drops(masked)
    drops.drop(module)
    run = trainer(tmp_path, monitor, max_epochs=2)
    run.fit(module, loader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert [look[:2] for look in monitor.looks] == [look[:2] for look in whole.looks] == [("train", 3), ("train", 7)]
    assert monitor.looks[0] == whole.looks[0]
    assert monitor.last == left(summed(module.batches[:4], "train"))


@ORDERS
def test_rounds_of_pruning(tmp_path: Path, first: bool) -> None:
    """Every token that is trained on before the last round is in a look, at the experts of its round."""
    monitor = ExpertUsageMonitor(every_n_steps=100)
    data = [{"input_ids": tiny_batch(2, LENGTH)}]
    pruning = ExpertPruning(data, 0.5, [0.25, 0.5], "rwn", start=2, every=3)
    guests = [monitor, pruning] if first else [pruning, monitor]
    trainer(tmp_path, *guests, max_epochs=2).fit(Still(training_model()), loader(masked=False))
    assert [step for _, step, _ in monitor.looks] == [2, 5]
    looks = [list(look.values()) for _, _, look in monitor.looks]
    assert [[len(count_E) for count_E in look] for look in looks] == [[8, 8], [6, 6]]
    assert [[sum(count_E) for count_E in look] for look in looks] == [
        [TOP_K * steps * 2 * LENGTH] * 2 for steps in (2, 3)
    ]
