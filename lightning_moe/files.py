"""Writing so that nothing is ever half there: write beside, then rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UMASK = os.umask(0o077)  # can only be read by setting it, which is safe while there is one thread
os.umask(UMASK)
SHARED = 0o666 & ~UMASK

GONE = ".gone"
"""How the name of a folder ends that is being removed."""


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; it takes the target's place when the block succeeds."""
    with _made_parents(target):
        beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            yield beside
            _share(beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside ``target`` to fill; it takes the target's place when the block succeeds.

    See ``put_in_place`` for what a kill leaves; the next call puts it back first.
    """
    with _made_parents(target):
        beside = clear_partial(target)
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                _share(file)
            put_in_place(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, target: Path) -> None:
    """Let a complete file or folder take the place of ``target``, which may be there as either.

    Of files that is one step. Where there is a folder, a kill between the two renames leaves no target but the complete
    old one beside it, ``.NAME.old``.
    """
    old = _old(target)
    remove(old)
    if target.exists() and (target.is_dir() or beside.is_dir()):
        target.replace(old)
    beside.replace(target)
    remove(old)


def put_back(target: Path) -> None:
    """Undo a ``put_in_place`` that was killed half-way."""
    if _old(target).exists() and not target.exists():
        _old(target).rename(target)
    remove(_old(target))


def clear_partial(target: Path) -> Path:
    """Remove what a killed ``replaced_folder`` left, and say where the next one writes."""
    beside = target.with_name(f".{target.name}.partial")
    put_back(target)
    remove(beside)
    return beside


def _share(file: Path) -> None:
    """Let others read a file as the umask has it: safetensors keeps what it writes to its owner."""
    if file.is_file() and not file.is_symlink():
        file.chmod(file.stat().st_mode | SHARED)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; what is not there is fine.

    A folder first loses its name, so that a kill never leaves a part of one under it. What then lies beside it, as
    ``.NAME.gone``, goes with the next removal of either.
    """
    gone = path if path.suffix == GONE else path.with_name(f".{path.name}{GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):  # what was removed before is still there, as where NFS keeps files that are mapped
            path.replace(gone)
        for one in (gone, path):
            shutil.rmtree(one, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """Make the folders above ``target``; those that were made are removed again, if empty, when the block fails."""
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def looks_local(path: str) -> bool:
    """Whether a path that does not exist can only have meant a file or folder here, not a name on a hub."""
    parent = Path(path).parent
    written_so = path.startswith((".", "/", "~")) or path.endswith(".json") or path.count("/") > 1
    return written_so or (parent != Path() and parent.exists())


def write_json(target: Path, value: Any) -> None:
    """Write JSON with the same bytes for the same value."""
    with replaced_file(target) as file:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
