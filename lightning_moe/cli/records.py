"""Records: finished pieces of a command's work, one JSON file each, so that a killed run loses only the last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_moe.files import remove, write_json

VERSION = 2


class Records:
    """The records of one request in a folder, by name.

    The folder is read once, at the start: what other ranks write meanwhile changes no decision of this one. Records
    of another request, or that cannot be read, are as good as missing.

    Args:
        folder: One file per record.
        request: What was asked, in plain values; a part of every record.
        writes: Whether this rank writes.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self._stamp: dict[str, Any] = {"version": VERSION, "request": json.loads(json.dumps(request))}
        self._found: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.json")):
            record = _read(file)
            if record is not None and all(record.get(name) == value for name, value in self._stamp.items()):
                self._found[file.stem] = record

    def get(self, name: str) -> dict[str, Any] | None:
        return self._found.get(name)

    def put(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a record and return it, stamped with version and request."""
        self._found[name] = dict(record) | self._stamp
        if self.writes:
            write_json(self.folder / f"{name}.json", self._found[name])
        return self._found[name]

    def clear(self) -> None:
        self._found.clear()
        if self.writes:
            remove(self.folder)


def without_stamp(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("version", "request")}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
