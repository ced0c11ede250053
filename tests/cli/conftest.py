"""One tiny checkpoint and its text for all tests of the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.blank_figures import blank_figures
from tests.helpers.checkpoint import Commands, documents, save_checkpoint, write_text


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
