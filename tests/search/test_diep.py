"""DiEPSearch: what it leaves alone, who moves at which update and how far, what it scores, and what it stores."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM, next_token_loss
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.importance import ImportanceLogits
from lightning_moe.search.relaxation import relaxed
from tests.helpers.families import tiny_batch, tiny_model
from tests.helpers.reference.stock_experts import watch
from tests.search.reference import cross_entropy, whole_loss
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

PRESSED: dict[str, Any] = {"task": "none", "weight": 0.0}
"""Nothing but the pressure."""


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


# ------------------------------------------------------------------------------------------------ the loss


def test_the_logged_losses_are_the_formulas() -> None:
    """At the start: cross entropy of the model itself, no distance, gates of 1."""
    model, ids = tiny_model("qwen2_moe"), tiny_batch(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    history = History()
    search = search_in(model, updates=2, weight=3.0, pressure=0.25, lr=2.0, score="frequency")
    fit(search, [batch_of(ids, mask)], history)
    model.eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    expected = float(cross_entropy(logits, ids, mask))
    loss_B, count_B = next_token_loss(logits, batch_of(ids, mask))
    assert expected == pytest.approx(float(loss_B.sum() / count_B.sum()), rel=1e-5)
    first, second = history.logged
    assert first["search/task"] == pytest.approx(expected, rel=1e-5)
    assert first["search/reconstruction"] == 0
    assert first["search/mean_gate"] == 1
    assert first["search/loss"] == pytest.approx(expected + 0.25, rel=1e-5)
    assert second["search/reconstruction"] > 0
    parts = [second[f"search/{name}"] for name in ("task", "reconstruction", "mean_gate")]
    assert second["search/loss"] == pytest.approx(parts[0] + 3 * parts[1] + 0.25 * parts[2], rel=1e-5)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_the_logged_distance_is_the_one_asked_for(target: Any, relative: bool) -> None:
    """Of the second update, from the gates that the first one left."""
    model, batch, history = tiny_model("mixtral"), batches(1)[0], History()
    search = search_in(model, updates=2, target=target, relative=relative, learn_alpha=False)
    fit(search, [batch], history)
    model.eval()
    importance = ImportanceLogits([8, 8])
    with torch.no_grad():
        importance.beta_L.copy_(history.learned[1][-1])
        views = []
        for context in (nullcontext(), relaxed(model, search.moe_layers, importance, "routed")):
            with context:
                hidden = search.model.decode(batch)
                views.append(hidden if target == "hidden" else model.get_output_embeddings()(hidden))
    teacher, student = views
    expected = (student - teacher).norm()
    if relative:
        expected = expected**2 / teacher.norm() ** 2
    assert history.logged[1]["search/reconstruction"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("target", ["hidden", "logits"])
def test_kl_and_distance_are_zero_at_the_start_and_not_after(target: Any) -> None:
    history = History()
    search = search_in(tiny_model("mixtral"), updates=2, task="kl", target=target, learn_alpha=False)
    fit(search, batches(1), history)
    first, second = history.logged
    assert first["search/task"] == pytest.approx(0, abs=1e-6)
    assert first["search/reconstruction"] == 0
    assert second["search/task"] > 1e-5 and second["search/reconstruction"] > 1e-6  # the pressure has moved beta


@pytest.mark.parametrize(
    "arguments",
    [
        {"task": "ce", "weight": 0.5},
        {"task": "kl", "target": "logits", "weight": 0.5},
        {"task": "none", "weight": 1.0, "relative": False},
        {"relaxation": "dense-routed"},
        {"relaxation": "literal", "relative": False},
    ],
)
def test_padding_changes_nothing(arguments: dict[str, Any]) -> None:
    """Whatever its tokens are: the window alone, or padded beside a blank window."""
    ids = tiny_batch(1, 9)
    found, counts = [], []
    for junk in (None, 3, 99):
        batch = batch_of(ids)
        if junk is not None:
            padded = torch.full((2, 14), junk)
            padded[0, :9] = ids
            batch = batch_of(padded, (torch.arange(14) < torch.tensor([[9], [0]])).long())
        search = search_in(tiny_model("mixtral"), updates=4, score="frequency", **arguments)
        randomize(search)
        fit(search, [batch])
        found.append(learned(search))
        counts.append(search.scores())
    for other in (1, 2):
        assert_same(found[other], found[0], tolerance=2e-5)
        for name in counts[0]:
            torch.testing.assert_close(counts[other][name], counts[0][name], rtol=1e-4, atol=1e-4)


def test_pressure_pushes_all_gates_down_alike() -> None:
    """By hand: of 8 + 8 gates d mean / d beta = 1/2, and a softmax has no way down: alphas stay."""
    search = search_in(tiny_model("mixtral"), updates=4, lr=0.1, pressure=2.0, **PRESSED)
    fit(search, batches(1))
    assert_same(learned(search), [torch.zeros(8), torch.zeros(8), torch.full((2,), 1 - 0.1 * 2 * 0.5)], 1e-6)


def test_pressure_is_what_frees_the_gates() -> None:
    history, free = History(), History()
    fit(search_in(tiny_model("mixtral"), updates=8, weight=5.0), batches(2), history)
    fit(search_in(tiny_model("mixtral"), updates=8, weight=5.0, pressure=0.0), batches(2), free)
    gates = [one["search/mean_gate"] for one in history.logged]
    assert gates[-1] < 0.95 < 1 == gates[0]
    assert gates[-1] < free.logged[-1]["search/mean_gate"]


def test_nothing_to_minimise_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to minimise"):
        search_in(tiny_model("mixtral"), updates=5, pressure=0.0, **PRESSED)


def test_distance_alone_is_flat_at_the_start() -> None:
    """Why there is pressure at all. As a plain norm, too."""
    for relative in (True, False):
        search = search_in(tiny_model("mixtral"), updates=4, task="none", pressure=0.0, relative=relative)
        fit(search, batches(1))
        assert_same(learned(search), [torch.zeros(8), torch.zeros(8), torch.ones(2)])


@pytest.mark.parametrize(("arguments", "forwards"), [({"weight": 0.0}, 1), ({}, 2), ({"task": "kl", "weight": 0.0}, 2)])
def test_no_teacher_where_none_is_needed(arguments: dict[str, Any], forwards: int) -> None:
    search = search_in(tiny_model("mixtral"), updates=3, **arguments)
    calls: list[Any] = []
    search.moe_layers[0].router.register_forward_hook(lambda *args: calls.append(args))
    fit(search, batches(1))
    assert len(calls) == 3 * forwards


def test_a_search_that_diverges_says_so() -> None:
    search = search_in(tiny_model("mixtral"), updates=20, lr=1e38, pressure=100.0, learn_alpha=False)
    with pytest.raises(InputError, match=r"loss is \S+ after [1-9]\d* updates.*; lower its lr 1e\+38"):
        fit(search, batches(1))


# -------------------------------------------------------------------------------------------------- scores


def scored(score: Any, **arguments: Any) -> DiEPSearch:
    """Alphas log (1, ..., 1, 9), betas 2 and -1."""
    search = search_in(tiny_model("mixtral"), score=score, **arguments)
    with torch.no_grad():
        for alpha_E in search.importance.alphas:
            alpha_E.copy_(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 9]).log())
        search.importance.beta_L.copy_(torch.tensor([2.0, -1.0]))
    return search


def test_scores_by_hand() -> None:
    """softmax of log (1 ... 1, 9) is 1/16 ... and 9/16: gates 0.5 and 4.5 before beta."""
    gate = list(scored("gate").scores().values())
    for score_E, beta in zip(gate, (2.0, -1.0), strict=True):
        assert score_E.dtype == torch.float64
        assert score_E.tolist() == pytest.approx([beta * 0.5] * 7 + [beta * 4.5])
    raw = list(scored("raw").scores().values())
    for score_E, beta in zip(raw, (2.0, -1.0), strict=True):
        assert score_E.tolist() == pytest.approx([0.0] * 7 + [beta * math.log(9)])


def test_frequency_by_hand() -> None:
    """``beta * E * count / all counts`` over every real token of every batch, routed by the full model."""
    model, data = tiny_model("mixtral"), batches(3)
    data[1]["attention_mask"][1, 4:] = 0
    layers = find_moe_layers(model)
    counts = [[0] * 8 for _ in layers]
    for batch in data:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        calls = watch(model, [(layer.router, layer.experts) for layer in layers], **inputs)
        for layer_counts, call in zip(counts, calls, strict=True):
            for real, ids in zip(batch["attention_mask"].flatten().tolist(), call.ids_TK.tolist(), strict=True):
                for expert in ids if real else []:
                    layer_counts[expert] += 1
    search = search_in(model, score="frequency", learn_alpha=False, updates=6, lr=3.0)
    fit(search, data)
    betas = search.importance.beta_L.tolist()
    assert betas[0] != betas[1] != 1
    for score_E, layer_counts, beta in zip(search.scores().values(), counts, betas, strict=True):
        expected = [beta * 8 * count / sum(layer_counts) for count in layer_counts]
        assert score_E.tolist() == pytest.approx(expected)
        assert score_E.sum().item() == pytest.approx(8 * beta)


def test_kept_experts_are_a_plan_over_all_layers() -> None:
    search = search_in(uneven_model("mixtral"), ratio=0.3, floor=3)
    randomize(search)
    scores = ExpertScores("", "", "", [layer.shape for layer in search.moe_layers], search.scores())
    keep = search.kept_experts()
    assert keep == make_plan(scores, 0.3, "global", 3).keep
    assert sum(map(len, keep.values())) == 7


def test_importance_logits_are_alpha_and_beta_by_layer() -> None:
    search = scored("gate")
    given = search.importance_logits()
    assert list(given) == [layer.name for layer in search.moe_layers]
    assert [float(beta) for _, beta in given.values()] == [2, -1]
    assert all(
        torch.equal(alpha_E, own) for (alpha_E, _), own in zip(given.values(), search.importance.alphas, strict=True)
    )
    assert not any(tensor.requires_grad for pair in given.values() for tensor in pair)


def test_experts_in_another_order_get_the_same_scores() -> None:
    order = [5, 7, 4, 6, 2, 0, 3, 1]
    found = []
    for permute in (False, True):
        model = tiny_model("mixtral")
        if permute:
            last = find_moe_layers(model)[-1]
            with torch.no_grad():
                for tensor in (*last.router.parameters(), *last.experts.parameters()):
                    tensor.copy_(tensor[order].clone())
        search = search_in(model, updates=8)
        fit(search, batches(2))
        found.append(list(search.scores().values()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1][order], rtol=1e-5, atol=1e-6)
    assert found[0][1].std() > 1e-3


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
