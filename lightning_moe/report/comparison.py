"""Cells of a comparison put together: their spread over seeds, and one flat table of everything."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_moe.files import replaced_file

Row = Mapping[str, Any]
"""One cell: method, strategy, scope, ratio, seed, status, and what was measured or why not."""

FULL = "full"
"""The method's name in the row of the model as it is."""

FIGURES = ("perplexity", "domain_mean", "gap", "load_cv", "load_cv_pruned", "perplexity_pruned")

COLUMNS = (
    "method",
    "strategy",
    "scope",
    "ratio",
    "seed",
    "status",
    "perplexity",
    "domain_mean",
    "gap",
    "loss",
    "tokens",
    "tokens_per_second",
    "load_cv",
    "load_cv_pruned",
    "perplexity_pruned",
    "finetune_tokens",
    "finetune_lr",
    "rounds",
    "method_seconds",
    "experts",
    "parameters",
    "nonzero_parameters",
    "bytes",
)
"""Of the flat table; then one per domain, then those in ``LAST``."""

LAST = ("kept_experts", "plan", "reason")


def with_gaps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The cells with how far each lies above the full model: ``gap``, in perplexity, as a fraction.

    What was tuned is held against the full model tuned as long with the same seed, anything else against the full model
    as it is.
    """
    full = {(row["ratio"], row["seed"]): row["perplexity"] for row in rows if row["method"] == FULL and _done(row)}
    gapped = []
    for row in rows:
        base = full.get((row["ratio"], row["seed"]) if row.get("finetune_tokens") else (0.0, None))
        known = _done(row) and row["method"] != FULL and base is not None
        gapped.append({**row, "gap": row["perplexity"] / base - 1} if known else dict(row))
    return gapped


def _done(row: Row) -> bool:
    return bool(row["status"] == "done")


def spreads(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per method, strategy, scope and ratio, in the order of the rows: mean, std, min and max over its seeds.

    ``std`` is that of a sample, and None where there is but one cell; a figure no cell has is None in all. Failed
    cells are counted, not averaged.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["strategy"], row["scope"], row["ratio"]), []).append(row)
    return [_spread(group) for group in groups.values()]


def _spread(group: Sequence[Row]) -> dict[str, Any]:
    done = [row for row in group if row["status"] == "done"]
    entry = {name: group[0][name] for name in ("method", "strategy", "scope", "ratio")}
    entry |= {"cells": len(done), "failed": len(group) - len(done)}
    for figure in FIGURES:
        values = [row[figure] for row in done if figure in row]
        entry[figure] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values, default=None),
            "max": max(values, default=None),
        }
    seconds = [row["method_seconds"] for row in done if row["method_seconds"] is not None]
    entry["method_seconds"] = statistics.fmean(seconds) if seconds else None
    return entry


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write one line per cell. Domains have a column each, ``perplexity/<domain>``; counts and plans are JSON."""
    domains = list(dict.fromkeys(domain for row in rows for domain in row.get("domains", {})))
    header = [*COLUMNS, *(f"perplexity/{domain}" for domain in domains), *LAST]
    with replaced_file(file) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, header, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            flat = {name: value for name, value in row.items() if value is not None}
            flat |= {f"perplexity/{domain}": value for domain, value in row.get("domains", {}).items()}
            flat |= {name: json.dumps(row[name]) for name in ("kept_experts", "plan") if name in row}
            writer.writerow(flat)
