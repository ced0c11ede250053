"""What RouterRebalance lets learn: routers, norms or all; of a model in 16 bits, held in float32."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moe.callbacks.router_rebalance import RouterRebalance, trained_parameters
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from tests.callbacks.rebalance_fit import Foreign, Late
from tests.callbacks.router_fit import loader, traces, trainer
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.training_models import training_model


class Decayed(Foreign):
    """AdamW, whose decay moves every weight it is given a gradient for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def should_learn(module: Foreign, train: str) -> set[str]:
    """By name: everything of a router but the correction bias, and vectors called norms."""
    routers = [f"wrapped.inner.0.{layer.name}." for layer in find_moe_layers(module.inner)]
    names = set()
    for name, parameter in module.named_parameters():
        prefix = next((prefix for prefix in routers if name.startswith(prefix)), None)
        part = "" if prefix is None else name.removeprefix(prefix)
        if part.startswith(("gate.", "router.", "wg.")) and "correction" not in name:
            names.add(name)
        if train == "routers+norms" and "norm" in name and parameter.dim() == 1:
            names.add(name)
    return names


@pytest.mark.parametrize("train", ["routers", "routers+norms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_stays_bit_by_bit(tmp_path: Path, family: str, train: Any) -> None:
    module = Decayed(training_model(family))
    module.inner.get_input_embeddings().weight.requires_grad_(False)  # somebody froze this before
    learns = should_learn(module, train)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    traces_before = traces(module)
    trainer(tmp_path, RouterRebalance(0.5, train=train), max_steps=2).fit(module, loader())
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert learns and changed == learns
    assert traces(module) == traces_before


def test_all_learns_by_default(tmp_path: Path) -> None:
    module = Decayed(training_model("mixtral"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer(tmp_path, RouterRebalance(0.5), max_steps=1).fit(module, loader())
    assert not [name for name, p in module.named_parameters() if torch.equal(p, before[name])]


def test_trained_parameters_are_given_once() -> None:
    """An optimiser refuses a weight twice."""
    for family in FAMILIES:
        model = tiny_model(family)
        for train in ("all", "routers", "routers+norms"):
            found = [id(parameter) for parameter in trained_parameters(model, train)]
            assert len(found) == len(set(found)), (family, train)


def test_a_model_that_is_made_late_is_frozen_before_the_optimiser_sees_it(tmp_path: Path) -> None:
    """So that states are made for the routers alone, and DDP waits for no gradient that never comes."""
    module = Late()
    trainer(tmp_path, RouterRebalance(0.5, train="routers"), max_steps=2).fit(module, loader())
    assert module.given == len(find_moe_layers(module.inner))


# --------------------------------------------------------------------------------------- of 16-bit weights


class Slow(Foreign):
    """AdamW at a rate that bfloat16 does not feel: the next number above 1 is 1.0078. May fail after two steps."""

    fails, lr = False, 1e-5

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.fails and batch_idx == 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


class Weights(Callback):
    """As they are at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def slow_model(family: str) -> Slow:
    """The model in bfloat16, somebody's own head in float32."""
    return Slow(training_model(family).to(torch.bfloat16))


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("train", ["routers", "routers+norms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_learns_of_a_16_bit_model_is_held_in_float32(tmp_path: Path, family: str, train: Any, fails: bool) -> None:
    """It moves with every step, and is rounded once, at the end; nothing else moves or changes its type."""
    module, weights = slow_model(family), Weights()
    module.fails = fails
    learns, traces_before = should_learn(module, train), traces(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = trainer(tmp_path, RouterRebalance(0.5, train=train), weights, precision="bf16-mixed", limit_train_batches=3)
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        run.fit(module, loader())
    assert learns and len(weights.seen) == (2 if fails else 3)
    last = {name: before[name].float() for name in learns}
    for seen in weights.seen:
        for name, parameter in seen.items():
            assert parameter.dtype == (torch.float32 if name in learns else before[name].dtype), name
            if name in learns:
                assert not torch.equal(parameter, last[name]), name
        last = {name: seen[name] for name in learns}
    for name, tensor in module.state_dict().items():
        expected = last[name].to(before[name].dtype) if name in learns else before[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert traces(module) == traces_before


@pytest.mark.parametrize("lr", [1e-6, 1e-2])
def test_a_note_says_what_rounding_loses(tmp_path: Path, lr: float, capsys: pytest.CaptureFixture[str]) -> None:
    module, weights = slow_model("mixtral"), Weights()
    before = {name: p.clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, RouterRebalance(0.5, train="routers"), weights, precision="bf16-mixed", max_steps=2)
    module.lr = lr
    run.fit(module, loader())
    moved = sum(int((weights.seen[-1][name] != before[name]).sum()) for name in should_learn(module, "routers"))
    left = sum(int((p != before[name]).sum()) for name, p in module.named_parameters())
    note = f"of {moved:,} weights that learned here, {moved - left:,} are as they were"
    assert (left < moved / 2) == (lr < 1e-3)
    assert (note in capsys.readouterr().out) == (lr < 1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("train", ["routers", "routers+norms"])
def test_a_16_bit_model_without_mixed_precision_is_refused(tmp_path: Path, train: Any, precision: Any) -> None:
    module, weights = slow_model("mixtral"), Weights()
    before, traces_before = {n: t.clone() for n, t in module.inner.state_dict().items()}, traces(module)
    with pytest.raises(InputError, match=r"^RouterRebalance: train .*bfloat16.*bf16-mixed") as caught:
        trainer(tmp_path, RouterRebalance(train=train), weights, precision=precision).fit(module, loader())
    assert "\n" not in str(caught.value) and not weights.seen
    for name, tensor in module.inner.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert traces(module) == traces_before
