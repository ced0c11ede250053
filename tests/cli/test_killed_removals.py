"""Unfinished work is removed when what came of it is safe: a kill in the midst of a removal loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.cli import rounds
from lightning_moe.files import put_back, put_in_place, remove
from lightning_moe.search.expert_scan import ExpertScan
from tests.cli.killed_rounds import QUIET, SEQ_LEN, Work, args_of, assert_ends_alike, often, plain
from tests.helpers.checkpoint import Commands, contents, read

LEFT = ("files", "folders")
"""What a removal that is killed has not come to yet; the order is the file system's."""


class Removals:
    """Removals of folders: the first of each that was not killed before is, half-way."""

    def __init__(self, left: str) -> None:
        self.left = left
        self.killed: set[Path] = set()

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        stock = shutil.rmtree

        def rmtree(folder: Any, *args: Any, **kwargs: Any) -> None:
            folder = Path(folder)
            if not folder.is_dir() or folder in self.killed or not any(folder.iterdir()):
                stock(folder, *args, **kwargs)
                return
            self.killed.add(folder)
            for place in folder.iterdir():
                if place.is_dir() and self.left == "files":
                    stock(place)
                elif place.is_file() and self.left == "folders":
                    place.unlink()
            raise SystemExit(137)  # which no command takes for a failed cell

        patch.setattr(shutil, "rmtree", rmtree)


class Scanned:
    """Batches that were scanned."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batches = 0
        stock = ExpertScan.add

        def add(scan: ExpertScan, batch: Any) -> None:
            self.batches += 1
            stock(scan, batch)

        patch.setattr(ExpertScan, "add", add)


def compare_args(checkpoint: Path, text: Path, out: Path) -> list[str]:
    """A method on statistics and a search, in rounds, and the full model tuned: of each a folder is removed."""
    data = ["--data.path", text / "harbour.txt", "--data.seq_len", SEQ_LEN, "--data.samples", 4, "--data.batch_size", 2]
    data += ["--data.val_path", text / "island.txt", "--data.val_samples", 3]
    grid = ["--methods", "[ean,scan]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]", "--strategies", "[lottery]"]
    args = ["compare", *QUIET, "--model.path", checkpoint, *data, *grid, "--seeds", 1, "--finetune_tokens", 4 * SEQ_LEN]
    return [str(arg) for arg in (*args, "--out", out)]


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    often(monkeypatch)


@pytest.mark.parametrize("left", LEFT)
def test_compare_killed_in_each_removal_does_nothing_twice(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, left: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        work, scanned = Work(patch), Scanned(patch)
        run.ok(*compare_args(checkpoint, text, whole))
    removals, tuned, batches, ended = Removals(left), [], 0, False
    while not ended:
        with pytest.MonkeyPatch.context() as patch:
            removals.patch(patch)
            done, scans, before = Work(patch), Scanned(patch), len(removals.killed)
            said = run(*compare_args(checkpoint, text, out))
            ended = said.code == 0
            assert ended or (said.code, len(removals.killed)) == (137, before + 1), said.err
            tuned += done.tuned
            batches += scans.batches
    assert {".saves.gone", ".round-01.gone"} < {folder.name for folder in removals.killed}
    assert sum(folder.parent.name == ".partial" for folder in removals.killed) >= 4  # each run of rounds, and the scan
    assert (tuned, batches) == (work.tuned, scanned.batches)
    assert lasting(out) == lasting(whole)
    assert contents(out).keys() == contents(whole).keys()


def lasting(out: Path) -> list[dict[str, Any]]:
    return [{**plain(row), "method_seconds": None} for row in read(out / "compare.json")["cells"]]


@pytest.mark.parametrize("left", LEFT)
def test_prune_killed_at_its_end_can_be_overwritten(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, left: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run.ok(*args_of("lottery", checkpoint, text, whole))
    removals, args = Removals(left), args_of("lottery", checkpoint, text, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "remove", lambda path: None)
        removals.patch(patch)
        assert run(*args).code == 137
    assert read(out / "prune.json")["rounds"] == 2  # all is done but the removal
    assert "carried out here before" in run.ok(*args).out
    run.ok(*args, "--overwrite", "true")
    assert_ends_alike(out, whole)
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("left", LEFT)
def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path, left: str) -> None:
    target = tmp_path / "saves"
    make(target)
    with pytest.MonkeyPatch.context() as patch:
        Removals(left).patch(patch)
        with pytest.raises(SystemExit):
            remove(target)
    assert not target.exists() and any(tmp_path.iterdir())
    make(target)
    remove(target)  # what the kill left goes with it
    assert not any(tmp_path.iterdir())


def make(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text(folder.name)


def test_an_old_folder_that_is_half_gone_is_not_put_back(tmp_path: Path) -> None:
    """Killed when the new one stands in its place: later, without that one, there is none."""
    target, beside = tmp_path / "model", tmp_path / "new"
    make(target)
    make(beside)
    with pytest.MonkeyPatch.context() as patch:
        Removals("files").patch(patch)
        with pytest.raises(SystemExit):
            put_in_place(beside, target)
    assert (target / "file").read_text() == "new" and (target / "inner").is_dir()
    remove(target)
    put_back(target)
    assert not any(tmp_path.iterdir())


def test_a_link_to_a_folder_goes_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to("kept")
    remove(tmp_path / "link")
    assert [place.name for place in tmp_path.rglob("*")] == ["kept", "file"]


def test_what_cannot_be_removed_yet_hinders_no_later_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps files that are still mapped: the folder of an earlier removal lies there, and is not empty."""
    gone, folder = tmp_path / ".work.gone", tmp_path / "work"
    for one in (gone, folder):
        one.mkdir()
        (one / "file").touch()
    stock = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **also: None if path == gone else stock(path, **also))
        remove(folder)
    assert [one.name for one in tmp_path.iterdir()] == [gone.name]
    remove(folder)
    assert not list(tmp_path.iterdir())
