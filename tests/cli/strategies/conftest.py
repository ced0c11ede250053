"""The whole grid of strategies, made once, and the command that fills such grids."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_moe.cli.main import main
from tests.cli.strategies.grid_runs import ALL, Strategies, on
from tests.helpers.blank_figures import blank_figures
from tests.helpers.checkpoint import Commands


@pytest.fixture(scope="session")
def finished(checkpoint: Path, text: Path, val_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole grid, unbroken; read it, and copy it to write."""
    out = tmp_path_factory.mktemp("strategies") / "run"
    with blank_figures():
        main(["compare", *on(checkpoint, text, val_text / "letters.txt"), *map(str, ALL), "--out", str(out)])
    return out


@pytest.fixture
def strategies(
    run: Commands, checkpoint: Path, text: Path, val_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Strategies:
    return Strategies(run, on(checkpoint, text, val_text / "letters.txt"), monkeypatch, tmp_path / "run")


@pytest.fixture
def again(strategies: Strategies, finished: Path) -> Strategies:
    """In a folder where the whole grid is there already."""
    shutil.copytree(finished, strategies.out)
    return strategies
