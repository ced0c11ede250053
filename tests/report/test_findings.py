"""What a pass says of the experts: against slow references, and laws of a rank correlation."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.scores import ExpertScores, score_by_all
from lightning_moe.report.findings import findings, rank_correlations
from lightning_moe.report.findings_figure import findings_figure
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.similarity import measured_pairs, similarity
from lightning_moe.stats.store import ModelStats
from tests.helpers.families import NUM_EXPERTS, TOP_K, tiny_batch, tiny_model

SHAPE = LayerShape("layer", 0, 5, 2)


def scores_of(name: str, values: Sequence[float], direction: str = "min") -> ExpertScores:
    scored = torch.tensor(values, dtype=torch.float64) * (1 if direction == "min" else -1)
    return ExpertScores("model", "data", name, [SHAPE], {"layer": scored}, settings={"direction": direction})


def slow_spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    a, b = ranks(one), ranks(other)
    centre = (len(a) + 1) / 2
    product = sum((x - centre) * (y - centre) for x, y in zip(a, b, strict=True))
    squares = (sum((x - centre) ** 2 for x in row) for row in (a, b))
    return product / (next(squares) * next(squares)) ** 0.5


rows = st.lists(st.integers(-3, 3), min_size=5, max_size=5).filter(lambda row: len(set(row)) > 1)


@given(rows, rows)
def test_equals_a_slow_reference_whichever_end_is_dropped(one: list[int], other: list[int]) -> None:
    found = rank_correlations([scores_of("a", one), scores_of("b", other, "max")])
    assert found["a"]["b"] == found["b"]["a"] == pytest.approx(slow_spearman(one, other), abs=1e-4)
    assert found["a"]["a"] == found["b"]["b"] == 1.0


def test_what_tells_no_experts_apart_correlates_with_nothing() -> None:
    found = rank_correlations([scores_of("a", [1, 2, 3, 4, 5]), scores_of("even", [7] * 5)])
    assert found["a"]["even"] is None and found["even"]["even"] is None


def test_findings_of_a_model() -> None:
    model, ids = tiny_model("mixtral"), tiny_batch(4)
    observation = Observation(model)
    with torch.no_grad(), observation.attached(model):
        observation.next_batch(ids)
        model(input_ids=ids)
    stats = ModelStats("model", "data", observation.compute())
    found = findings(stats, score_by_all(stats))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for layer in stats.layers:
        shares = found["frequency"][layer.shape.name]
        assert sum(shares) == pytest.approx(TOP_K, abs=1e-4)
        assert shares == pytest.approx((layer.count_E / ids.numel()).tolist(), abs=1e-6)
        alike, known = found["similarity"][layer.shape.name], measured_pairs(layer)
        values = []
        for p in range(NUM_EXPERTS):
            for q in range(NUM_EXPERTS):
                value = alike["pairs"][p][q]
                assert (value is None) == (not known[p, q])
                if value is not None:
                    assert value == pytest.approx(float(similarity(layer)[p, q]), abs=1e-6)
                    values += [value] if p != q else []
        assert alike["mean"] == (pytest.approx(sum(values) / len(values), abs=1e-5) if values else None)
    figure = findings_figure(found)
    figure.canvas.draw()
    titles = [axes.get_title() for axes in figure.axes]
    assert "share of the tokens that an expert gets" in titles and "layer 1" in titles
