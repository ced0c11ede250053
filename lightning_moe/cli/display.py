"""What a command says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_moe.pruning.round_record import MOMENTS, RoundRecord

NOT_SHOWN = ("version", "command", "repeated", "beyond", "versions", "request", "methods", "models", "load", "layers")


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
    if results.get("beyond"):
        options = " and ".join(results["beyond"])
        console.print(
            f"All of this was carried out here before, and with {options} more than is asked now; --overwrite true "
            "does what is asked, and leaves out the rest."
        )
    elif results.get("repeated"):
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


def show_rounds(records: Sequence[RoundRecord], first: bool = True) -> None:
    """Print a line a round: perplexity and load skew at its three moments. ``first`` prints the heading too."""
    heading = (
        "round",
        "dropped",
        "perplexity before",
        "pruned",
        "tuned",
        "load cv before",
        "pruned",
        "tuned",
        "tokens",
    )
    widths = (6, 8, 18, 9, 9, 15, 7, 7, 11)
    console = Console(soft_wrap=True, highlight=False)
    if first:
        console.print(" ".join(word.rjust(width) for word, width in zip(heading, widths, strict=True)), style="bold")
    for record in records:
        perplexity = [_moment(record.perplexity.get(name, {}).get("all")) for name in MOMENTS]
        load = [_moment(record.load.get(name, {}).get("mean", {}).get("cv")) for name in MOMENTS]
        cells = (str(record.round), f"{record.ratio:.1%}", *perplexity, *load, f"{record.tokens:,}")
        console.print(" ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def _moment(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)
