"""What ``plan`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_moe.evaluation.device import GiB
from lightning_moe.moe.weights import readable_count

COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ.",
    "statistics": "stats",
    "transient": "transient",
}
"""Figures of a job, and what stands above them."""

WIDTH = 100
"""Fewest characters of a line: the table has no use when it is cut."""


def show_plan(results: Mapping[str, Any], out: str | None) -> None:
    """Print the table, what to change where something does not fit, and what the times rest on."""
    console = Console(soft_wrap=True, highlight=False)
    parameters, active = (readable_count(results[name]) for name in ("parameters", "active_parameters"))
    memory, usable = (_gib(results[name]) for name in ("memory", "usable"))
    console.print(f"{results['model']}: {parameters} parameters, {active} of them active for one token")
    console.print(
        f"{results['devices']}, {results['strategy']}, {results['precision']}, {results['batch']}; "
        f"{memory} GiB a device, {usable} of them to be filled"
    )
    table = Table(
        title="GiB on the fullest rank, at its fullest moment",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("job", no_wrap=True)
    for name in (*COLUMNS.values(), "sum", "fits", "RAM", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for job, row in results["jobs"].items():
        if "refused" in row:
            table.add_row(job, "refused")
            continue
        cells = [_gib(row.get(name, 0), blank=True) for name in COLUMNS]
        total = _gib(row["bytes"], blank=True)
        fits = "yes" if row["fits"] else "no"
        table.add_row(job, *cells, total, fits, _gib(row["host"], blank=True), _duration(row["seconds"]))
    wide = Console(width=max(console.width, WIDTH), highlight=False)
    wide.print(table)
    for job, row in results["jobs"].items():
        if "refused" in row:
            console.print(f"{job}: refused: {row['refused']}")
        elif not row["fits"]:
            console.print(f"{job} does not fit: {_gib(row['bytes'])} GiB of {usable} ({row['at']}). {_remedies(row)}")
    for row in results["jobs"].values():
        if "note" in row:
            console.print(f"{row['note']}.")
    loading = _duration(results["assumed"]["loading_seconds"])
    console.print(
        f"RAM: GiB of its node's memory that a rank takes besides. Times are rough, and without loading ({loading})."
    )
    if out is not None:
        console.print(f"These figures, in bytes and seconds, are in {out}/estimate.json.")


def _remedies(row: Mapping[str, Any]) -> str:
    found = [f"{one['change']} ({_gib(one['total'])})" for one in row["remedies"]]
    return f"It does with {', or '.join(found)}." if found else "Nothing that is known here helps."


def _gib(size: float, blank: bool = False) -> str:
    return "" if blank and not size else f"{size / GiB:,.{0 if size >= 1000 * GiB else 1}f}"


def _duration(seconds: float | None) -> str:
    """In the unit that suits."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
