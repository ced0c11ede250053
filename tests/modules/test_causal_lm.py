"""MoECausalLM: it learns, continues exactly, and its schedule and groups are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import save_model
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.checkpoint import VOCAB, write_text
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.small_fits import batch_of, made, trainer, training_text

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


class Record(Callback):
    """What was logged, and the learning rate, at each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def test_fit_of_a_new_model_learns(checkpoint: Path, tmp_path: Path) -> None:
    """From random weights near the uniform loss to well below on text that repeats itself."""
    file = write_text(tmp_path / "same.txt", ["The same words, again and again. " * 40])
    seed_everything(0, verbose=False)
    record = Record()
    module = MoECausalLM(config=CONFIG, lr=1e-2, warmup_steps=2)
    trainer(tmp_path, record, max_steps=30).fit(
        module, training_text(checkpoint, file, seq_len=32, samples=None, batch_size=2)
    )
    assert record.losses[0] == pytest.approx(math.log(VOCAB), rel=0.1)
    assert record.losses[-1] < record.losses[0] / 2


@pytest.mark.parametrize("uniform", [True, False])
def test_fit_of_a_pruned_model(checkpoint: Path, text: Path, tmp_path: Path, uniform: bool) -> None:
    model = tiny_model("mixtral", vocab_size=VOCAB)
    names = [layer.name for layer in find_moe_layers(model)]
    keep = {names[0]: [0, 2, 5, 7], names[1]: [1, 2, 3, 6] if uniform else [1, 4, 6]}
    keep_experts(model, keep)
    save_model(model, tmp_path / "pruned", str(checkpoint))
    module = MoECausalLM(str(tmp_path / "pruned"), lr=1e-3)
    record = Record()
    trainer(tmp_path, record, max_steps=9).fit(module, training_text(checkpoint, text))
    assert record.losses[-1] < record.losses[0]
    assert [layer.num_experts for layer in module.moe_layers] == [len(ids) for ids in keep.values()]
    for layer in module.moe_layers:
        assert bool(layer.router_weight.isfinite().all())


def fit(
    folder: Path,
    checkpoint: Path,
    text: Path,
    max_steps: int,
    ckpt_path: Path | None = None,
    max_epochs: int | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Weights after a fit whose checkpoints of every step are in ``folder``; the schedule is always of 8 steps."""
    seed_everything(1, verbose=False)
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            trainer.should_stop = trainer.global_step >= max_steps

    module = MoECausalLM(str(checkpoint), lr=3e-3, warmup_steps=2)
    data = training_text(checkpoint, text, **kwargs)
    trainer(folder, Stop(), saves, checkpoints=True, max_steps=8, max_epochs=max_epochs).fit(
        module, data, ckpt_path=None if ckpt_path is None else str(ckpt_path)
    )
    return {name: tensor.detach().clone() for name, tensor in module.network.state_dict().items()}


@pytest.mark.parametrize(("step", "max_epochs"), [(1, None), (3, None), (4, None), (6, None), (1, 3), (4, 3)])
def test_resumed_fit_equals_an_uninterrupted_one(
    checkpoint: Path, text: Path, tmp_path: Path, step: int, max_epochs: int | None
) -> None:
    """Bit by bit, from a checkpoint in the middle of an epoch (1, 4) or at its end (3, 6); an epoch has 3 steps. With
    the number of epochs given, Lightning can say how many steps there will be, for which it looks at the text."""
    whole = fit(tmp_path / "whole", checkpoint, text, 8, max_epochs=max_epochs)
    fit(tmp_path / "first", checkpoint, text, step, max_epochs=max_epochs)
    resumed = fit(tmp_path / "second", checkpoint, text, 8, tmp_path / "first" / f"step={step}.ckpt", max_epochs)
    start = MoECausalLM(str(checkpoint))
    assert not torch.equal(whole["lm_head.weight"], made(start).network.state_dict()["lm_head.weight"])
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(("warmup", "lowest"), [(0, 0.1), (4, 0.1), (3, 0.0), (12, 0.5)])
def test_learning_rate(warmup: int, lowest: float) -> None:
    module = MoECausalLM(config=CONFIG, warmup_steps=warmup, min_lr_ratio=lowest)
    total = 12
    factors = [module.lr_factor(step, total) for step in range(total + 1)]
    # Linear up to 1 at the last step of warm-up ...
    for step in range(warmup):
        assert factors[step] == pytest.approx((step + 1) / warmup)
    # ... then half a cosine from 1 down to the lowest, where it stays.
    if warmup < total:
        assert factors[warmup] == 1.0
        middle = module.lr_factor((warmup + total) // 2, total) if (warmup + total) % 2 == 0 else None
        if middle is not None:
            assert middle == pytest.approx((1 + lowest) / 2)
        assert all(a >= b for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))
        assert factors[total] == pytest.approx(lowest)
        assert module.lr_factor(10 * total, total) == pytest.approx(lowest)
    assert all(0 <= factor <= 1 for factor in factors)


def test_learning_rate_in_a_fit(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    record = Record()
    module = MoECausalLM(str(checkpoint), lr=1e-3, warmup_steps=2, min_lr_ratio=0.1)
    trainer(tmp_path, record, max_epochs=2).fit(module, training_text(checkpoint, text))
    assert record.rates == pytest.approx([1e-3 * module.lr_factor(step, 6) for step in range(6)])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("tied", [True, False])
def test_decay_groups(tmp_path: Path, family: str, tied: bool) -> None:
    """Matrices decay; norms, biases and embeddings do not; every weight is in one group."""
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    module = made(MoECausalLM(str(tmp_path / "model"), weight_decay=0.3))
    groups: list[dict[str, Any]] = []

    class Grab(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            groups.extend(trainer.optimizers[0].param_groups)

    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in batch_of(tiny_batch(1)).items()}])
    trainer(tmp_path, Grab(), max_steps=1).fit(module, loader)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    assert decay.keys() == {id(p) for p in module.parameters()}
    for name, parameter in module.named_parameters():
        plain = parameter.dim() < 2 or "norm" in name or name.endswith("bias") or "embed" in name
        assert decay[id(parameter)] == (0.0 if plain else 0.3), name


def gradients(module: MoECausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.network.train()
    module.training_step(batch, 0).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(checkpoint: Path) -> None:
    """Those of the routers included, whose choice is made a second time in the backward pass."""
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    kept, recomputed = (
        gradients(made(MoECausalLM(str(checkpoint), gradient_checkpointing=on)), batch_of(ids)) for on in (False, True)
    )
    assert kept.keys() == recomputed.keys()
    assert any("gate.weight" in name for name in kept)
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("source", ["path", "config"])
def test_a_fit_trains_in_training_mode(checkpoint: Path, text: Path, tmp_path: Path, source: str) -> None:
    """Transformers gives loaded models in evaluation mode, where dropout and gradient checkpointing are off."""
    modes: list[bool] = []

    class Modes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            modes.append(all(module.training for module in pl_module.modules()))

    module = MoECausalLM(str(checkpoint)) if source == "path" else MoECausalLM(config=CONFIG)
    data = training_text(checkpoint, text / "harbour.txt", val_path=str(text / "island.txt"))
    trainer(tmp_path, Modes(), max_epochs=2).fit(module, data)
    assert modes == [True] * 6


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_recomputes_in_a_fit(checkpoint: Path, text: Path, tmp_path: Path, on: bool) -> None:
    """Each decoder layer runs a second time in the backward pass."""
    module = made(MoECausalLM(str(checkpoint), gradient_checkpointing=on))
    runs: list[str] = []
    for layer in module.moe_layers:
        layer.experts.register_forward_pre_hook(lambda *args, name=layer.name: runs.append(name))
    trainer(tmp_path, max_steps=1).fit(module, training_text(checkpoint, text))
    assert len(runs) == len(module.moe_layers) * (2 if on else 1)


def test_gradient_checkpointing_is_on(checkpoint: Path) -> None:
    assert made(MoECausalLM(str(checkpoint), gradient_checkpointing=True)).network.is_gradient_checkpointing
    assert not made(MoECausalLM(str(checkpoint))).network.is_gradient_checkpointing


def test_configure_model_is_done_once(checkpoint: Path) -> None:
    module = made(MoECausalLM(str(checkpoint)))
    model, layers = module.network, module.moe_layers
    module.configure_model()
    assert module.network is model
    assert module.moe_layers is layers
    assert MoECausalLM(str(checkpoint)).model is None  # nothing is loaded before it is asked for


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtype(checkpoint: Path, dtype: Any) -> None:
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    for module in (MoECausalLM(str(checkpoint), dtype=dtype), MoECausalLM(config=CONFIG, dtype=dtype)):
        assert {p.dtype for p in made(module).parameters()} == {expected}


def test_no_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        made(MoECausalLM())
    with pytest.raises(InputError, match="model_type"):
        made(MoECausalLM(config={"hidden_size": 4}))


def test_the_callers_config_is_not_changed() -> None:
    config = dict(CONFIG)
    made(MoECausalLM(config=config))
    assert config == CONFIG
