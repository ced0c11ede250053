"""Cells put together: spread over seeds, and the flat table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.report.comparison import spreads, write_csv
from lightning_moe.report.comparison_table import show_comparison


def cell(
    perplexity: float | None, seed: int | None = None, method: str = "random", ratio: float = 0.5
) -> dict[str, Any]:
    settings = {"method": method, "scope": "layer", "ratio": ratio, "seed": seed}
    if perplexity is None:
        return settings | {"status": "failed", "reason": 'a comma, a "quote"', "traceback": ["line"]}
    domains = {"a b": perplexity, "c": 2 * perplexity}
    figures = {"perplexity": perplexity, "domain_mean": 1.5 * perplexity, "domains": domains, "method_seconds": 2.0}
    return settings | {"status": "done", **figures, "kept_experts": {"x": 2}, "plan": {"x": [0, 3]}}


def test_spread_by_hand() -> None:
    """1, 2 and 6: mean 3, squares of the distances 4 + 1 + 9 = 14, over 2 is 7."""
    (entry,) = spreads([cell(1.0, 0), cell(2.0, 1), cell(6.0, 2), cell(None, 3)])
    assert entry["perplexity"] == {"mean": 3.0, "std": pytest.approx(7**0.5), "min": 1.0, "max": 6.0}
    assert entry["domain_mean"]["mean"] == 4.5
    assert (entry["cells"], entry["failed"], entry["method_seconds"]) == (3, 1, 2.0)


def test_groups_keep_the_order_of_the_cells() -> None:
    rows = [cell(1.0, None, "b"), cell(2.0, 0, "a"), cell(3.0, 0, "a", 0.25), cell(4.0, 1, "a")]
    assert [(entry["method"], entry["ratio"]) for entry in spreads(rows)] == [("b", 0.5), ("a", 0.5), ("a", 0.25)]


def test_huge_perplexities_are_numbers() -> None:
    (entry,) = spreads([cell(1e304, 0), cell(1e-3, 1)])
    assert entry["perplexity"]["std"] > 1e303


def test_failed_cells_have_a_line_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [cell(None, 0), cell(2.5, 1)])
    with (tmp_path / "table.csv").open(newline="") as stream:
        failed, done = csv.DictReader(stream)
    assert (failed["status"], failed["reason"], failed["perplexity"]) == ("failed", 'a comma, a "quote"', "")
    assert (done["perplexity/a b"], done["perplexity/c"], done["plan"]) == ("2.5", "5.0", '{"x": [0, 3]}')


def test_table_of_anything(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut off where there is no terminal, and a cell that nobody asked for is blank."""
    rows = [cell(8.0, None, "full", 0.0)]
    rows += [
        cell(number, int(number), "random", ratio) for number in (123456.0, 10.0) for ratio in (0.1, 0.25, 0.5, 0.75)
    ]
    rows += [cell(None, None, "reap", 0.5), cell(9.0, None, "ean", 0.1), cell(None, 3, "random", 0.1)]
    show_comparison(spreads(rows))
    said = capsys.readouterr().out
    assert "…" not in said
    assert all(text in said for text in ("10%", "75%", "8.00", "9.00", "6.173e+04 ± 8.729e+04", "(1 failed)", "failed"))
    show_comparison(spreads([cell(8.0, None, "full", 0.0)]))
