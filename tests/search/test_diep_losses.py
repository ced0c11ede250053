"""What DiEPSearch minimises: the formulas, without padding, under a pressure that frees the gates."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import next_token_loss
from lightning_moe.search.importance import ImportanceLogits
from lightning_moe.search.relaxation import relaxed
from tests.helpers.families import tiny_batch, tiny_model
from tests.search.reference import cross_entropy
from tests.search.tiny_search import History, assert_same, batch_of, batches, fit, learned, randomize, search_in

PRESSED: dict[str, Any] = {"task": "none", "weight": 0.0}
"""Nothing but the pressure."""


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
