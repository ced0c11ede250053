"""Cells put together: spread over seeds, and the flat table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.report.comparison import spreads, with_gaps, write_csv
from lightning_moe.report.comparison_table import show_comparison


def cell(
    perplexity: float | None,
    seed: int | None = None,
    method: str = "random",
    ratio: float = 0.5,
    strategy: str = "one-shot",
) -> dict[str, Any]:
    settings = {"method": method, "strategy": strategy, "scope": "layer", "ratio": ratio, "seed": seed}
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


def test_strategies_are_groups_of_their_own() -> None:
    rows = [cell(1.0, 0), cell(5.0, 0, strategy="lottery"), cell(2.0, 1), cell(None, 1, strategy="lottery")]
    one_shot, lottery = spreads(rows)
    assert (one_shot["strategy"], one_shot["perplexity"]["mean"], one_shot["failed"]) == ("one-shot", 1.5, 0)
    assert (lottery["strategy"], lottery["perplexity"]["mean"], lottery["failed"]) == ("lottery", 5.0, 1)


def test_a_figure_that_some_cells_have_is_averaged_over_these() -> None:
    rows = [cell(1.0, seed, strategy="lottery") | {"perplexity_pruned": value} for seed, value in enumerate((3.0, 5.0))]
    (entry,) = spreads([*rows, cell(1.0, 2, strategy="lottery"), cell(None, 3, strategy="lottery")])
    assert (entry["perplexity_pruned"]["mean"], entry["perplexity_pruned"]["max"], entry["cells"]) == (4.0, 5.0, 3)
    assert entry["load_cv"] == {"mean": None, "std": None, "min": None, "max": None}


def test_huge_perplexities_are_numbers() -> None:
    (entry,) = spreads([cell(1e304, 0), cell(1e-3, 1)])
    assert entry["perplexity"]["std"] > 1e303


def test_failed_cells_have_a_line_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [cell(None, 0, strategy="lottery"), cell(2.5, 1)])
    with (tmp_path / "table.csv").open(newline="") as stream:
        failed, done = csv.DictReader(stream)
    assert (failed["strategy"], done["strategy"]) == ("lottery", "one-shot")
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


def test_table_of_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each; the full model as it is on top, and tuned among the others, never the best of a ratio."""
    rows = [cell(8.0, None, "full", 0.0)]
    rows += [cell(9.0, None, "reap"), cell(7.0, 0, "reap", strategy="lottery"), cell(6.0, 0, "full", strategy="tuned")]
    show_comparison(spreads(rows))
    lines = [line for line in capsys.readouterr().out.splitlines() if "\u2502" in line]
    words = [[word.strip() for word in line.strip("\u2502").split("\u2502")] for line in lines]
    assert [line[:4] for line in words] == [
        ["full model", "", "", "8.00"],
        ["reap", "one-shot", "layer", "9.00"],
        ["reap", "lottery", "layer", "7.00"],
        ["full model", "tuned", "", "6.00"],
    ]


def test_gaps_by_hand() -> None:
    """As it is 8, tuned for 0.5 with seed 0 4: 10 lies a quarter above the one, 5 a quarter above the other."""
    full = [cell(8.0, None, "full", 0.0)]
    full += [
        cell(4.0, 0, "full", 0.5, "tuned"),
        cell(2.0, 1, "full", 0.5, "tuned"),
        cell(6.0, 0, "full", 0.25, "tuned"),
    ]
    tuned = {"finetune_tokens": 128}
    full[1:] = [row | tuned for row in full[1:]]
    others: list[tuple[dict[str, Any], float | None]] = [
        (cell(10.0, None, "reap"), 0.25),
        (cell(6.0, 0), -0.25),  # chance alone makes it no tuned one
        (cell(10.0, None, "reap", strategy="iterative") | {"finetune_tokens": 0}, 0.25),
        (cell(5.0, 0, "reap", strategy="lottery") | tuned, 0.25),
        (cell(5.0, 1, "reap", strategy="lottery") | tuned, 1.5),
        (cell(9.0, 0, "reap", 0.25, "lottery") | tuned, 0.5),
        (cell(5.0, 2, "reap", strategy="lottery") | tuned, None),  # nobody tuned the full model with this seed
        (cell(None, 0, "reap", strategy="lottery"), None),
    ]
    rows = [*full, *(row for row, _ in others)]
    gapped = with_gaps(rows)
    assert [row.get("gap") for row in gapped] == [None] * 4 + [gap for _, gap in others]
    assert [{name: row[name] for name in row if name != "gap"} for row in gapped] == rows
    assert not any("gap" in row for row in rows)


def test_no_gap_to_a_full_model_that_failed() -> None:
    """Its cell has no perplexity; those that were not tuned have their gaps all the same."""
    lottery = cell(5.0, 0, "reap", strategy="lottery") | {"finetune_tokens": 128}
    rows = [cell(8.0, None, "full", 0.0), cell(None, 0, "full", strategy="tuned"), lottery, cell(10.0, None, "reap")]
    assert [row.get("gap") for row in with_gaps(rows)] == [None, None, None, 0.25]
