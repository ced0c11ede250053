"""Whose unfinished work lies in a run folder, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.errors import InputError


def begun(folder: Path, command: str, request: dict[str, object], overwrite: bool = False, **also: object) -> RunFolder:
    """With a file in its unfinished work, as a kill leaves it."""
    run = RunFolder(str(folder), command, request, overwrite)
    partial = run.partial(**also)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "work").touch()
    return run


def work(folder: Path) -> set[str]:
    return {file.parent.name.partition("-")[0] for file in folder.glob(".partial/*/work")}


def test_work_of_the_same_request_is_gone_on_with(tmp_path: Path) -> None:
    place = begun(tmp_path, "prune", {"ratio": 0.5}, ranks=2).partial(ranks=2)
    run = RunFolder(str(tmp_path), "prune", {"ratio": 0.5}, overwrite=False)
    assert run.partial(ranks=2) == place and run.partial(ranks=4) != place
    run.finish({})
    assert not (tmp_path / ".partial").exists()


def test_work_of_another_request_is_not_lost_without_a_word(tmp_path: Path) -> None:
    begun(tmp_path, "prune", {"ratio": 0.5})
    with pytest.raises(InputError, match=r"unfinished work of another `prune`.*--overwrite true"):
        RunFolder(str(tmp_path), "prune", {"ratio": 0.25}, overwrite=False)
    assert work(tmp_path) == {"prune"}
    RunFolder(str(tmp_path), "prune", {"ratio": 0.25}, overwrite=True).finish({})
    assert work(tmp_path) == set()


def test_another_command_leaves_it_alone(tmp_path: Path) -> None:
    begun(tmp_path, "prune", {"ratio": 0.5})
    begun(tmp_path, "score", {}).finish({})
    assert work(tmp_path) == {"prune"}
    RunFolder(str(tmp_path), "prune", {"ratio": 0.5}, overwrite=False).finish({})
    assert not (tmp_path / ".partial").exists()
