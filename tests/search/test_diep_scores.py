"""What DiEPSearch makes of alpha and beta: scores, kept experts and importance logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.search.diep import DiEPSearch
from tests.helpers.families import tiny_model
from tests.helpers.reference.stock_experts import watch
from tests.search.tiny_search import batches, fit, randomize, search_in, uneven_model


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
