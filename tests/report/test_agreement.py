"""How far the plans of a comparison agree: which are compared, the numbers, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from lightning_moe.pruning.plan import agreement
from lightning_moe.report.agreement import agreement_figure, by_chance, matrix_figure, write_agreements
from tests.helpers.checkpoint import read


def cell(plan: list[int], strategy: str, seed: int | None = None, ratio: float = 0.5, **other: Any) -> dict[str, Any]:
    settings = {"method": "reap", "strategy": strategy, "scope": "layer", "ratio": ratio, "seed": seed}
    return settings | {"status": "done", "plan": {"mlp": plan}} | other


def written(folder: Path, rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The entries by what they compare."""
    write_agreements(folder, rows)
    found = read(folder / "agreement.json")
    assert found["version"] == 1
    entries = {
        (*entry["plans"], entry["method"], entry["scope"], entry["ratio"]): entry for entry in found["agreements"]
    }
    assert len(entries) == len(found["agreements"])
    return entries


def test_agreements_by_hand(tmp_path: Path) -> None:
    """One-shot has no seed, so both seeds of the lottery are held against it: 1/3 and 1. Tuning changes no plan."""
    rows = [
        cell([0, 1], "one-shot"),
        cell([1, 2], "lottery", 0),
        cell([0, 1], "lottery", 1),
        cell([5, 6], "one-shot-tuned", 0),
        cell([5, 6], "tuned", 0, method="full", scope=None),
        cell([5, 6], "one-shot", method="full", scope=None, ratio=0.0),
    ]
    (entry,) = written(tmp_path, rows).values()
    assert (entry["plans"], entry["seeds"]) == (["one-shot", "lottery"], 2)
    assert entry["agreement"] == pytest.approx((1 / 3 + 1) / 2)
    assert matplotlib.image.imread(tmp_path / "agreement.png").std() > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agreement.json", "agreement.png"]


def test_a_seed_is_held_against_itself(tmp_path: Path) -> None:
    rows = [cell([0, 1], "one-shot", 0), cell([2, 3], "one-shot", 1)]
    rows += [cell([0, 1], "iterative", 0), cell([2, 3], "iterative", 1), cell([2, 3], "lottery", 7)]
    (entry,) = written(tmp_path, rows).values()  # seed 7 has nobody
    assert (entry["plans"], entry["seeds"], entry["agreement"]) == (["one-shot", "iterative"], 2, 1.0)


def test_only_what_is_alike_but_for_the_strategy_is_compared(tmp_path: Path) -> None:
    rows = [
        cell([0, 1], "one-shot"),
        cell([0, 1], "iterative", ratio=0.25),
        cell([0, 1], "iterative", scope="global"),
        cell([0, 1], "iterative", method="ean"),
        cell([0, 1], "iterative") | {"status": "failed"},
    ]
    write_agreements(tmp_path, rows)
    assert not list(tmp_path.iterdir())
    write_agreements(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_every_pair_ratio_and_method_has_its_entry(tmp_path: Path) -> None:
    strategies = ("lottery", "iterative", "one-shot")
    rows = [
        cell([0, 1], name, ratio=ratio, method=method)
        for method in ("reap", "ean")
        for ratio in (0.5, 0.25)
        for name in strategies
    ]
    entries = written(tmp_path, rows)
    pairs = [("one-shot", "iterative"), ("one-shot", "lottery"), ("iterative", "lottery")]
    assert entries.keys() == {
        (*pair, method, "layer", ratio) for pair in pairs for method in ("reap", "ean") for ratio in (0.25, 0.5)
    }


def test_files_of_earlier_cells_do_not_stay(tmp_path: Path) -> None:
    """With --overwrite a folder holds what the last command found."""
    written(tmp_path, [cell([0, 1], "one-shot"), cell([0, 1], "iterative")])
    write_agreements(tmp_path, [cell([0, 1], "one-shot")])
    assert not list(tmp_path.iterdir())


def test_the_figure_has_a_panel_per_pair_and_a_line_per_method() -> None:
    entries = [
        {"plans": pair, "method": method, "scope": "layer", "ratio": ratio, "agreement": 1 - ratio}
        for pair in (["one-shot", "iterative"], ["one-shot", "lottery"])
        for method in ("reap", "ean")
        for ratio in (0.5, 0.25)
    ]
    panels = agreement_figure(entries).axes
    assert [axes.get_title() for axes in panels] == ["one-shot and iterative", "one-shot and lottery"]
    for axes in panels:
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines["reap, layer"] == lines["ean, layer"] == [[0.25, 0.75], [0.5, 0.5]]
        assert lines["by chance"] == [[0.25, by_chance(0.25)], [0.5, by_chance(0.5)]]
        assert len(lines) == 3
    assert len(agreement_figure(entries[:1]).axes) == 1


def test_by_chance_is_what_random_plans_have() -> None:
    """Half of many: a quarter is in both, three quarters in either."""
    assert by_chance(0.5) == pytest.approx(1 / 3)
    assert by_chance(0.0) == 1.0
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.25, 0.5, 0.75):
        one, other = (
            {"mlp": torch.randperm(4000, generator=generator)[: int(4000 * (1 - ratio))].tolist()} for _ in "12"
        )
        assert agreement(one, other)["all"] == pytest.approx(by_chance(ratio), abs=0.02)


def test_the_matrix_says_every_number() -> None:
    figure = matrix_figure(["a", "b"], [[1.0, 0.25], [0.25, 1.0]])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "1.00"),
        ((1, 0), "0.25"),
        ((0, 1), "0.25"),
        ((1, 1), "1.00"),
    }
