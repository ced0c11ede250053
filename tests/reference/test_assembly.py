"""The provenance page says what was measured."""

from __future__ import annotations

from pathlib import Path

from lightning_moe.reference.assembly import _curve, _provenance


def test_curve_joins_the_logs_of_a_resumed_run(tmp_path: Path) -> None:
    head = "epoch,step,train/loss,val/perplexity,val/perplexity/a\n"
    for version, rows in (("version_0", "0,9,3.0,,\n0,199,,50.0,51.0\n"), ("version_1", "0,399,,40.0,41.0\n")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text(head + rows)
    curve = _curve(tmp_path)
    assert [(row["step"], row["val/perplexity"]) for row in curve] == [(200, 50.0), (400, 40.0)]


def test_page_names_sources_tokens_and_figures() -> None:
    figures = {
        "domains": {"a": 12.34},
        "perplexity": 23.45,
        "least_load": [0.5],
        "most_load": [1.5],
        "parameters": 6_700_000,
        "kind": "A mixtral model",
        "config": "configs/some.yaml",
        "tokens_per_step": 100,
    }
    package = {"name": "texts", "version": "1.2", "licence": "CC0"}
    sources = {"a": {"packages": [package], "files": {"train": {"bytes": 5_000_000}}}}
    curve = [{"step": step, "val/perplexity": 100.0 - step, "val/perplexity/a": 90.0 - step} for step in range(1, 31)]
    page = _provenance(figures, sources, curve)
    for expected in ("texts 1.2", "CC0", "| 12.3 | 23.4", "| 0 | 0.50 | 1.50 |", "in 30 steps", "6.7M parameters"):
        assert expected in page
    assert len([line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]) <= 13
