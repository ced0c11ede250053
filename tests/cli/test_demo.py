"""The demo, with less text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_moe.cli import demo
from tests.helpers.checkpoint import Commands


@pytest.mark.slow
def test_demo_prunes_reloads_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_WINDOWS", 12)
    monkeypatch.setattr(demo, "VALIDATION_WINDOWS", 12)
    said = Commands(capsys)("demo", "--out", tmp_path / "demo", "--trainer.accelerator", "cpu")
    assert said.code == 0, said.err
    models = json.loads((tmp_path / "demo" / "summary.json").read_text())["models"]
    assert len(models) == 1 + len(demo.METHODS) * len(demo.RATIOS)
    full = models.pop("full")
    for name, row in models.items():
        assert row["parameters"] < full["parameters"] and row["bytes"] < full["bytes"], name
        assert row["perplexity"] > full["perplexity"], name
        assert row["loaded_by"] == ("lightning_moe" if "global" in name else "stock")
        assert set(row["domains"]) == set(full["domains"]) and name in said.out
