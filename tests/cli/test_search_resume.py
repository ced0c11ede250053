"""A killed search goes on: it sees the windows that are left, and writes what an unbroken one does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.callbacks.importance_figures import ImportanceFigures
from lightning_moe.cli import search as command
from tests.cli.search_runs import UPDATES, Killed, Whole, Windows, on, results, search_args, whole_searches
from tests.helpers.checkpoint import Commands, contents, read
from tests.helpers.processes import train_py, wait_for


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is enough, and much faster."""
    monkeypatch.setattr(ImportanceFigures, "_figures", lambda figures, keep: {})


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_searches(checkpoint, text, tmp_path_factory)


@pytest.fixture(scope="module")
def searched(whole: Whole) -> Path:
    """An unbroken search."""
    return whole()[0]


def killed(run: Commands, kill_before: int, args: list[object]) -> list[list[list[int]]]:
    """Run a command that is killed before that batch; the windows it saw."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        windows = Windows(patch, kill_before)
        run(*args)
    return windows.seen


@pytest.mark.parametrize(
    ("more", "kill_before", "saved_at", "accumulate"),
    [
        ((), 1, 0, 1),  # before the first save: from the beginning
        ((), 2, 2, 1),  # right after a save
        ((), 5, 4, 1),  # the fifth batch opens the second epoch; the fourth was the last of the first
        ((), 6, 6, 1),
        (("--accumulate", 3), 16, 4, 3),
        (("--score", "frequency", "--patience", 3, "--check_every", 2), 5, 4, 1),
        (("--trainer.precision", "bf16-true", "--lr", 1e-3, "--min_lr_ratio", 0.1), 3, 2, 1),
    ],
)
def test_killed_it_goes_on_as_if_nothing_had_been(
    run: Commands,
    whole: Whole,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[object, ...],
    kill_before: int,
    saved_at: int,
    accumulate: int,
) -> None:
    unbroken, windows = whole(*more)
    assert len(windows) == UPDATES * accumulate
    monkeypatch.setattr(command, "SAVE_EVERY", 2)
    args = [*search_args(checkpoint, text, *more), "--out", tmp_path]
    assert killed(run, kill_before, args) == windows[:kill_before]
    assert not (tmp_path / "search.json").exists()
    rest = Windows(monkeypatch)
    said = run.ok(*args)
    assert (f"Going on from update {saved_at} " in said.out) == (saved_at > 0)
    assert rest.seen == windows[saved_at * accumulate :]  # the order of the windows goes on, too
    assert results(tmp_path) == results(unbroken)
    assert not [name for name in contents(tmp_path) if "partial" in name or name.endswith("ckpt")]
    ignored = {"seconds", "search_seconds"}
    one, other = (read(folder / "search.json").items() for folder in (tmp_path, unbroken))
    assert {k: v for k, v in one if k not in ignored} == {k: v for k, v in other if k not in ignored}


def test_killed_at_the_very_end_it_still_draws(
    run: Commands, searched: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update is saved, the figures are not drawn yet."""
    monkeypatch.setattr(command, "SAVE_EVERY", UPDATES)

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ImportanceFigures, "_figures", kill)
        with pytest.raises(Killed):
            run(*search_args(checkpoint, text), "--out", tmp_path)
    said = run.ok(*search_args(checkpoint, text), "--out", tmp_path)
    assert f"Going on from update {UPDATES} " in said.out
    assert results(tmp_path) == results(searched)


@pytest.mark.parametrize("at", ["write_scores", "write_json"])
def test_killed_while_writing_it_still_ends_the_same(
    run: Commands,
    searched: Path,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    monkeypatch.setattr(command, "SAVE_EVERY", 3)

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(command, at, kill)
        with pytest.raises(Killed):
            run(*search_args(checkpoint, text), "--out", tmp_path)
    assert not (tmp_path / "search.json").exists()
    run.ok(*search_args(checkpoint, text), "--out", tmp_path)
    assert results(tmp_path) == results(searched)


def test_half_a_save_is_passed_over(
    run: Commands, searched: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves one that comes while a save is written."""
    monkeypatch.setattr(command, "SAVE_EVERY", 2)
    args = [*search_args(checkpoint, text), "--out", tmp_path]
    killed(run, 3, args)
    (save,) = tmp_path.rglob("*.ckpt")
    assert save.name == "step-2.ckpt"
    data = save.read_bytes()
    save.with_name("step-4.partial").write_bytes(data[: len(data) // 2])
    said = run.ok(*args)
    assert "Going on from update 2 " in said.out
    assert results(tmp_path) == results(searched)
    assert not [name for name in contents(tmp_path) if "partial" in name or name.endswith("ckpt")]


@pytest.mark.parametrize(("name", "left"), [("step-6.partial", ["step-4.ckpt"]), ("step-6.ckpt", ["step-6.ckpt"])])
def test_killed_while_saving_it_goes_on_from_a_whole_save(
    run: Commands,
    searched: Path,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    left: list[str],
) -> None:
    """Before the new save gets its name, and after the old one is gone; there is one at any moment."""
    monkeypatch.setattr(command, "SAVE_EVERY", 2)
    args = [*search_args(checkpoint, text), "--out", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        replace, unlink = Path.replace, Path.unlink

        def renamed(file: Path, target: Path) -> Path:
            if file.name == name:
                raise Killed
            return replace(file, target)

        def removed(file: Path, missing_ok: bool = False) -> None:
            unlink(file, missing_ok)
            if name.endswith("ckpt") and file.name == "step-4.ckpt":
                raise Killed

        patch.setattr(Path, "replace", renamed)
        patch.setattr(Path, "unlink", removed)
        run(*args)
    assert [file.name for file in tmp_path.rglob("*.ckpt")] == left
    assert f"Going on from update {left[0][5]} " in run.ok(*args).out
    assert results(tmp_path) == results(searched)


def test_another_request_does_not_go_on_from_this_one(
    run: Commands, searched: Path, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SAVE_EVERY", 2)
    args = [*search_args(checkpoint, text), "--out", tmp_path]
    killed(run, 3, [*args, "--lr", 0.5])
    said = run.ok(*args).out
    assert "Going on" not in said and "unfinished work of another `search`" in said
    assert results(tmp_path) == results(searched)


@pytest.mark.slow
def test_sigkill_loses_no_more_than_since_the_last_save(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    args = ["search", *on(checkpoint, text), "--updates", 100]
    process = train_py(*args, "--out", tmp_path / "parts")
    try:
        wait_for(lambda: any((tmp_path / "parts").rglob("*.ckpt")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "parts" / "search.json").exists()
    assert "Going on from update" in run.ok(*args, "--out", tmp_path / "parts").out
    run.ok(*args, "--out", tmp_path / "whole")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
