"""Correction biases under RouterRebalance: one step towards even load with each step of the optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_moe.callbacks.router_rebalance import RouterRebalance
from lightning_moe.moe.layers import find_moe_layers
from tests.callbacks.rebalance_fit import ByHand, CountsBiases, Foreign, assert_differ, assert_same, gradients
from tests.callbacks.router_fit import loader, trainer
from tests.helpers.training_models import training_model

WITH_BIASES = ["deepseek_v3", "ernie4_5_moe"]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
@pytest.mark.parametrize("family", WITH_BIASES)
def test_biases_move_by_one_step_towards_even_load(
    tmp_path: Path, family: str, masked: bool, accumulate: int, recompute: bool
) -> None:
    """b_i += step * sign(mean count - count_i), once per optimiser step, by all its batches, each token once."""
    step, module = 0.01, CountsBiases(training_model(family, pruned=True, recompute=recompute))
    shapes = {tuple(bias.shape) for layer in find_moe_layers(module.inner) for bias in layer.correction_biases}
    assert shapes == ({(4,), (6,)} if family == "deepseek_v3" else {(1, 4), (1, 6)})
    guest = RouterRebalance(bias_step=step)
    trainer(tmp_path, guest, accumulate_grad_batches=accumulate).fit(module, loader(masked))
    assert len(module.counts) == 4
    assert len(module.biases) == 5
    uneven = False
    for number in range(4):
        stepped = (number + 1) % accumulate == 0
        window = module.counts[number + 1 - accumulate : number + 1]
        for turn, (before, after) in enumerate(zip(module.biases[number], module.biases[number + 1], strict=True)):
            if not stepped:
                assert torch.equal(after, before)
                continue
            count_E = [sum(batch[turn][expert] for batch in window) for expert in range(before.numel())]
            mean = sum(count_E) / len(count_E)
            signs = [(mean > count) - (mean < count) for count in count_E]
            uneven |= any(signs)
            expected = before + step * torch.tensor(signs, dtype=torch.float32).view_as(before)
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-7)
    assert uneven


def test_reentrant_recomputing_counts_for_biases_too(tmp_path: Path) -> None:
    found = []
    for reentrant in (None, True):
        model = training_model("deepseek_v3")
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        trainer(tmp_path, RouterRebalance(bias_step=0.01), max_steps=1).fit(Foreign(model), loader())
        found.append([bias.clone() for layer in find_moe_layers(model) for bias in layer.correction_biases])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("family", WITH_BIASES)
def test_layers_with_biases_have_no_load_balance_loss(tmp_path: Path, family: str) -> None:
    """With ``bias_step``; the gradients of the first step are those without a guest, and nothing is logged."""
    model = training_model(family)
    guest = gradients(tmp_path, Foreign(model), RouterRebalance(0.5, bias_step=0.01), max_steps=1)
    assert_same(guest, gradients(tmp_path, Foreign(training_model(family)), max_steps=1))
    assert guest.logged == [{}]
    other = gradients(tmp_path, Foreign(training_model(family)), RouterRebalance(0.5), max_steps=1)
    assert_differ(other, guest, model)
    z = gradients(tmp_path, Foreign(training_model(family)), RouterRebalance(0.5, z_loss=0.2, bias_step=0.01))
    hand = gradients(tmp_path, ByHand(training_model(family), 0.0, 0.2), max_steps=1)
    z.steps = z.steps[:1]
    assert_same(z, hand)


def test_without_biases_the_step_changes_nothing(tmp_path: Path) -> None:
    guest = gradients(tmp_path, Foreign(training_model("mixtral")), RouterRebalance(0.5, bias_step=0.01))
    assert_same(guest, gradients(tmp_path, ByHand(training_model("mixtral"), 0.5)))


def test_validation_moves_no_bias(tmp_path: Path) -> None:
    found = []
    for kwargs, loaders in (({}, ()), ({"val_check_interval": 1, "num_sanity_val_steps": 0}, (loader(masked=False),))):
        model = training_model("deepseek_v3")
        trainer(tmp_path, RouterRebalance(bias_step=0.01), **kwargs).fit(Foreign(model), loader(), *loaders)
        found.append([bias.clone() for layer in find_moe_layers(model) for bias in layer.correction_biases])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
