"""Whose unfinished work lies in a run folder, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.errors import InputError
from lightning_moe.files import replaced_file, replaced_folder


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


def test_work_of_another_request_stays_and_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = begun(tmp_path, "prune", {"ratio": 0.5}).partial()
    RunFolder(str(tmp_path), "prune", {"ratio": 0.25}, overwrite=False).finish({})
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{tmp_path / '.partial'} keeps unfinished work of another `prune`" in said
    with pytest.raises(InputError, match=r"results of another `prune` \(other ratio\).*--overwrite true"):
        RunFolder(str(tmp_path), "prune", {"ratio": 0.5}, overwrite=False)
    again = RunFolder(str(tmp_path), "prune", {"ratio": 0.5}, overwrite=True)
    assert again.partial() == place and (place / "work").exists()
    again.finish({})
    assert work(tmp_path) == set() and not capsys.readouterr().out


def test_results_whose_files_another_command_has_replaced_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    RunFolder(str(tmp_path), "prune", {}, overwrite=False).finish({}, "plan.json")
    assert RunFolder(str(tmp_path), "prune", {}, overwrite=False).finished
    (tmp_path / "plan.json").write_text("of a search")
    assert RunFolder(str(tmp_path), "prune", {}, overwrite=False).finished is None
    (tmp_path / "plan.json").unlink()
    assert RunFolder(str(tmp_path), "prune", {}, overwrite=False).finished is None


def test_overwriting_drops_what_others_left(tmp_path: Path) -> None:
    begun(tmp_path, "prune", {"ratio": 0.5})
    begun(tmp_path, "search", {})
    RunFolder(str(tmp_path), "prune", {"ratio": 0.25}, overwrite=True).finish({})
    assert work(tmp_path) == {"search"}


def test_another_command_leaves_it_alone(tmp_path: Path) -> None:
    begun(tmp_path, "prune", {"ratio": 0.5})
    begun(tmp_path, "score", {}).finish({})
    assert work(tmp_path) == {"prune"}
    RunFolder(str(tmp_path), "prune", {"ratio": 0.5}, overwrite=False).finish({})
    assert not (tmp_path / ".partial").exists()


def test_others_may_read_what_safetensors_writes(tmp_path: Path) -> None:
    """It keeps files to their owner, whatever the umask says."""
    plain = tmp_path / "plain"
    plain.touch()
    with replaced_file(tmp_path / "one.safetensors") as beside:
        save_file({"a": torch.ones(1)}, beside)
    with replaced_folder(tmp_path / "model") as folder:
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    for file in (tmp_path / "one.safetensors", tmp_path / "model" / "model.safetensors"):
        assert file.stat().st_mode == plain.stat().st_mode
