"""The table of a comparison in the terminal: methods and scopes down, ratios across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_moe.report.comparison import FULL

SHORT = 0.1
"""Seconds below which a method costs nothing worth a number."""

WIDE = 60, 36
"""Columns of text that the names, and each ratio, take at most: what a file that we are piped into gets."""


def show_comparison(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the perplexities, mean and standard deviation over seeds; the lowest of each ratio in bold."""
    full = next((entry for entry in entries if entry["method"] == FULL and not entry["ratio"]), None)
    groups = {_line(entry) + (entry["ratio"],): entry for entry in entries if entry is not full}
    ratios = list(dict.fromkeys(ratio for *_, ratio in groups))
    lines = dict.fromkeys(key[:-1] for key in groups)
    table = Table("method", "strategy", "scope", title="perplexity (lower is better), by share of experts dropped")
    table.title_justify = "left"
    for column in table.columns:
        column.no_wrap = True
    for ratio in ratios:
        table.add_column(f"{100 * ratio:g}%", justify="right", no_wrap=True)
    table.add_column("method takes", justify="right", no_wrap=True)
    if full is not None:
        table.add_row(
            "full model", "", "", *([_number(full["perplexity"]["mean"])] * len(ratios)), "", end_section=True
        )
    pruned = {key: group for key, group in groups.items() if group["method"] != FULL}
    best = {ratio: _lowest(group for key, group in pruned.items() if key[-1] == ratio) for ratio in ratios}
    for line in lines:
        found = [groups.get((*line, ratio)) for ratio in ratios]
        cells = [_cell(group, best[ratio]) for ratio, group in zip(ratios, found, strict=True)]
        seconds = [group["method_seconds"] for group in found if group and group["method_seconds"] is not None]
        table.add_row(*line, *cells, _seconds(seconds))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE[0] + WIDE[1] * len(ratios))
    console.print(table)


def _line(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if entry["method"] == FULL:
        return "full model", entry["strategy"], ""
    return entry["method"], entry["strategy"], entry["scope"]


def _lowest(groups: Any) -> float | None:
    return min((group["perplexity"]["mean"] for group in groups if group["cells"]), default=None)


def _cell(group: Mapping[str, Any] | None, best: float | None) -> str:
    if group is None:
        return ""
    if not group["cells"]:
        return "[red]failed[/red]"
    found = group["perplexity"]
    text = _number(found["mean"]) + (f" ± {_number(found['std'])}" if found["std"] is not None else "")
    if found["mean"] == best:
        text = f"[bold]{text}[/bold]"
    return text + (f" [red]({group['failed']} failed)[/red]" if group["failed"] else "")


def _seconds(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{max(values):,.1f} s" if max(values) >= SHORT else f"< {SHORT} s"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"
