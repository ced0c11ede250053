"""A tiny checkpoint and its text for the tests of the modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoint import documents, save_checkpoint, write_text


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "harbour.txt", documents(40))
    write_text(folder / "island.txt", documents(30, start=100))
    return folder
