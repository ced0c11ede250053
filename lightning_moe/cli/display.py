"""What a command says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

NOT_SHOWN = ("version", "command", "repeated", "versions", "request", "methods", "models")


def show(out: str, results: Mapping[str, Any] | None) -> None:
    """Print the figures of a command and where they are; None, on ranks that write nothing, prints nothing."""
    if results is None:
        return
    table = Table(show_header=False, title=results["command"], title_justify="left")
    for name, value in results.items():
        if name in NOT_SHOWN:
            continue
        if isinstance(value, Mapping):
            for inner, number in value.items():
                table.add_row(f"{name}: {inner}", _readable(number))
        else:
            table.add_row(name, _readable(value))
    console = Console(soft_wrap=True)
    console.print(table)
    if results.get("repeated"):
        console.print("This very request was carried out here before; --overwrite true does it again.")
    console.print(f"Results are in {out}, these figures in {out}/{results['command']}.json.", highlight=False)


def show_perplexities(models: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one row a model: perplexity per domain, then what it costs. The first row is the full model."""
    first = next(iter(models.values()))
    quality = Table("model", *first["domains"], "all", title="perplexity (lower is better)", title_justify="left")
    cost = Table(
        "model", "parameters", "bytes on disk", "tokens/s", "loaded by", title="what it costs", title_justify="left"
    )
    for table in (quality, cost):
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify, column.overflow = "right", "fold"
    for name, row in models.items():
        numbers = [*row["domains"].values(), row["perplexity"]]
        quality.add_row(name, *(f"{number:.1f}" for number in numbers))
        speed = f"{row['tokens_per_second']:,.0f}"
        cost.add_row(name, f"{row['parameters']:,}", f"{row['bytes']:,}", speed, row["loaded_by"])
    console = Console()
    for table in (quality, cost):
        console.print(table)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)
