"""One tiny checkpoint, its text and their statistics for all tests of the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_moe.cli.main import main
from tests.helpers.bad_input import Place
from tests.helpers.blank_figures import blank_figures
from tests.helpers.checkpoint import Commands, documents, save_checkpoint, write_text
from tests.helpers.command_runs import model_args, text_args
from tests.helpers.comparisons import Compare
from tests.helpers.shared_work import shared_folder


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    """A command leaves its seed in the environment; the next test starts without."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def _blank_figures() -> Iterator[None]:
    """The tests of figures draw, and the README's tour."""
    with blank_figures():
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 2 layers, 8 experts, top-2, with its tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "harbour.txt", documents(50))
    write_text(folder / "island.txt", documents(30, start=100))
    return folder


@pytest.fixture(scope="module")
def stats_file(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of the text, gradients among them, that many tests cut from."""

    def score(folder: Path) -> None:
        args = ("score", *model_args(checkpoint), *text_args(text), "--gradients", "true", "--out", folder)
        main([str(arg) for arg in args])

    return shared_folder(tmp_path_factory, "scored", score) / "stats.safetensors"


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, text: Path, stats_file: Path) -> Place:
    return Place(tmp_path, checkpoint, text, stats_file)


@pytest.fixture(scope="session")
def val_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val_text")
    write_text(folder / "letters.txt", documents(20, start=500))
    write_text(folder / "tales.txt", documents(20, start=700))
    return folder


@pytest.fixture
def comparison(
    run: Commands, checkpoint: Path, text: Path, val_text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Compare:
    return Compare(run, checkpoint, text, val_text, monkeypatch, tmp_path / "run")
