"""DiEPSearch: what it leaves alone, who moves at which update and how far, and what it stores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.search.diep import DiEPSearch
from tests.helpers.families import tiny_batch, tiny_model
from tests.search.reference import whole_loss
from tests.search.tiny_search import (
    History,
    assert_same,
    batch_of,
    batches,
    fit,
    learned,
    randomize,
    search_in,
    uneven_model,
    wrapped,
)

# ------------------------------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_base_weights_stay_and_get_their_settings_back(family: str, precision: Any) -> None:
    model = tiny_model(family).to(torch.bfloat16 if precision == "bf16-true" else torch.float32).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    search = search_in(model, updates=4)
    seen: list[tuple[bool, bool]] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            parameters = any(parameter.requires_grad for parameter in model.parameters())
            seen.append((parameters, any(module.training for module in model.modules())))

    fit(search, batches(2), Look(), precision=precision)
    assert seen == [(False, False)] * 4  # frozen, and without dropout or router noise
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert not frozen.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(hasattr(layer.experts, "lightning_moe_hooks") for layer in find_moe_layers(model))
    assert not torch.equal(learned(search)[0], torch.zeros(8))


def test_layers_may_differ_in_their_number_of_experts() -> None:
    search = search_in(uneven_model("deepseek_v3"), updates=4)
    fit(search, batches(2))
    assert [len(alpha_E) for alpha_E in search.importance.alphas] == [4, 6]
    assert all(alpha_E.abs().max() > 0 for alpha_E in search.importance.alphas)
    assert {name: len(score_E) for name, score_E in search.scores().items()} == {
        layer.name: layer.num_experts for layer in search.moe_layers
    }


# -------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "aaabaaab"),
        ({"schedule": "1:2"}, "abbabbab"),
        ({"schedule": "1:1"}, "abababab"),
        ({"betas": "fixed"}, "aaaaaaaa"),
        ({"betas": "3:1"}, "aaaaaaaa"),
        ({"learn_alpha": False}, "bbbbbbbb"),
        ({"accumulate": 2, "updates": 4}, "-a-a-a-b"),
        ({"accumulate": 3, "updates": 2}, "--a--a"),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_who_moves_at_each_batch(arguments: dict[str, Any], expected: str, optimizer: Any) -> None:
    """With Adam, too: the momentum of the one must not move it in a turn of the other."""
    history = History()
    search = search_in(tiny_model("mixtral"), **({"updates": 8, "optimizer": optimizer, "lr": 0.05} | arguments))
    trainer = fit(search, batches(3), history)
    assert history.moved() == expected
    assert search.done == trainer.global_step == search.updates


def test_updates_by_hand() -> None:
    """Plain gradient descent on the slow loss: alphas, then beta at what the alphas have become (Algorithm 1)."""
    model, ids = uneven_model("mixtral"), tiny_batch(2, 6)
    search = search_in(model, updates=2, schedule="1:1", lr=0.3, weight=0.7, pressure=0.2)
    randomize(search)
    alphas = [alpha_E.detach().double().requires_grad_() for alpha_E in search.importance.alphas]
    beta_L = search.importance.beta_L.detach().double().requires_grad_()
    fit(search, [batch_of(ids)])

    slow = uneven_model("mixtral").double().requires_grad_(False)
    parts = [(layer.router, layer.experts) for layer in find_moe_layers(slow)]
    for moving in (alphas, [beta_L]):
        whole_loss(slow, parts, alphas, beta_L, "routed", ids, 0.7, 0.2).backward()
        with torch.no_grad():
            for parameter in moving:
                parameter -= 0.3 * parameter.grad
            for parameter in (*alphas, beta_L):
                parameter.grad = None
    for found, expected in zip(learned(search), [*alphas, beta_L], strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_accumulated_halves_equal_the_whole() -> None:
    """Windows of equal length, losses that are means; what is left is rounding."""
    arguments: dict[str, Any] = {"updates": 4, "weight": 0.0, "lr": 1.0}
    whole, halves = (search_in(tiny_model("mixtral"), **arguments, accumulate=turns) for turns in (1, 2))
    fit(whole, batches(4, rows=4))
    fit(halves, [batch_of(part) for one in batches(4, rows=4) for part in one["input_ids"].split(2)])
    assert halves.done == whole.done == 4
    assert_same(learned(halves), learned(whole), tolerance=2e-6)
    assert all(alpha_E.abs().max() > 1e-3 for alpha_E in whole.importance.alphas)


@pytest.mark.parametrize("relaxation", ["routed", "dense-routed"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_gradient_checkpointing_changes_nothing(family: str, relaxation: Any) -> None:
    """But it does compute the layers again."""
    found, calls = [], []
    for again in (False, True):
        model = tiny_model(family)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        search = search_in(model, updates=5, relaxation=relaxation, weight=0.5)
        calls.append(0)

        def count(*args: Any) -> None:
            calls[-1] += 1

        search.moe_layers[0].router.register_forward_hook(count)
        fit(search, batches(2))
        found.append(learned(search))
        assert all(module.training for module in model.modules())
    assert calls == [10, 15]  # teacher and student; and the student again
    assert_same(found[0], found[1])


def test_cosine_of_the_learning_rate() -> None:
    """Of 4 updates from 1 to 0.2: 1, 0.2 + 0.8 (1 + cos(pi/4)) / 2 and so on, whichever optimiser it is."""
    expected = [0.5 * (0.2 + 0.4 * (1 + math.cos(math.pi * turn / 4))) for turn in range(4)]
    assert expected[2] == pytest.approx(0.5 * 0.6)
    for min_lr_ratio, rates in ((0.2, expected), (1.0, [0.5] * 4)):
        history = History()
        fit(search_in(tiny_model("mixtral"), updates=4, min_lr_ratio=min_lr_ratio), batches(2), history)
        assert history.rates == pytest.approx(rates)


def test_the_rate_is_what_alphas_go_by() -> None:
    """Adam's first step is the rate itself, and where one cosine ends at zero nothing has moved much."""
    history = History()
    search = search_in(
        tiny_model("mixtral"), updates=8, optimizer="adam", lr=0.05, min_lr_ratio=0.0, betas="fixed", weight=0.0
    )
    fit(search, batches(1), history)
    steps = [
        float((after[0] - before[0]).abs().max())
        for before, after in zip(history.learned, history.learned[1:], strict=False)
    ]
    assert steps[0] == pytest.approx(0.05, rel=1e-2)
    assert steps[-1] < 0.15 * steps[0]


# --------------------------------------------------------------------------------------- bfloat16, and disk


def saved(folder: Path, every: int = 2) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "search-{step}", every_n_train_steps=every, save_top_k=-1, monitor=None)


def test_small_updates_are_not_lost_in_bfloat16(tmp_path: Path) -> None:
    """Steps of 1e-5 beside 1, where bfloat16 knows nothing between 1 and 1.0078; over a save and a resume, too."""
    arguments: dict[str, Any] = {"updates": 6, "optimizer": "adam", "lr": 1e-5, "schedule": "1:1"}

    def made() -> DiEPSearch:
        return DiEPSearch(wrapped(tiny_model("mixtral").to(torch.bfloat16)), **arguments)

    history = History()
    whole = made()
    fit(whole, batches(1), history, saved(tmp_path), precision="bf16-true", enable_checkpointing=True)
    assert history.moved() == "ababab"
    assert all(parameter.dtype == torch.float32 for parameter in whole.importance.parameters())
    assert whole.model.network.dtype == torch.bfloat16
    beta = whole.importance.beta_L
    assert 0 < (1 - beta).abs().min() <= (1 - beta).abs().max() < 4e-5
    resumed = made()
    fit(resumed, batches(1), precision="bf16-true", ckpt_path=tmp_path / "search-step=4.ckpt")
    assert_same(learned(resumed), learned(whole))


def test_checkpoints_hold_alpha_and_beta_alone(tmp_path: Path) -> None:
    search = search_in(tiny_model("mixtral", vocab_size=2000), updates=2, optimizer="adam", lr=0.1)
    fit(search, batches(1), saved(tmp_path), enable_checkpointing=True)
    file = tmp_path / "search-step=2.ckpt"
    state = torch.load(file, weights_only=True)
    assert set(state["state_dict"]) == {"_importance.alphas.0", "_importance.alphas.1", "_importance.beta_L"}
    assert_same(
        [state["state_dict"][f"_importance.{name}"] for name in ("alphas.0", "alphas.1", "beta_L")], learned(search)
    )
    assert file.stat().st_size < 50_000 < search.model.network.get_input_embeddings().weight.nbytes


@pytest.mark.parametrize("arguments", [{}, {"score": "frequency", "accumulate": 2}, {"min_lr_ratio": 0.0}])
def test_resumed_equals_unbroken(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """One batch again and again, so that the data's order, tested with the command, does not matter here."""

    def made() -> DiEPSearch:
        return search_in(tiny_model("mixtral"), updates=7, optimizer="adam", lr=0.1, **arguments)

    whole, resumed = made(), made()
    fit(whole, batches(1), saved(tmp_path, 3), enable_checkpointing=True)
    fit(resumed, batches(1), ckpt_path=tmp_path / "search-step=3.ckpt")
    assert resumed.done == 7
    assert_same(learned(resumed), learned(whole))
    assert_same(list(resumed.scores().values()), list(whole.scores().values()))


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"learn_alpha": False, "betas": "3:1"}, "nothing to learn"),
        ({"updates": 0}, "updates 0: at least 1"),
        ({"accumulate": -1}, "accumulate -1: at least 1"),
        ({"betas": "learnt"}, "betas 'learnt'"),
        ({"schedule": "3"}, "schedule '3'"),
        ({"lr": -0.1}, "lr -0.1"),
        ({"lr": math.nan}, "lr nan"),
        ({"min_lr_ratio": -1.0}, "min_lr_ratio -1.0"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DiEPSearch(MoECausalLM("/nowhere"), **arguments)


def test_a_fixed_profile_is_what_the_gates_get() -> None:
    search = search_in(tiny_model("deepseek_v3"), betas="3:1")
    assert search.importance.beta_L.tolist() == [1.5, 0.5]
    assert [float(gates_E[0]) for gates_E in search.importance.gates()] == [1.5, 0.5]
