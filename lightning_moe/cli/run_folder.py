"""The run folder: what a command was asked, what it found, and whether it may write here."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_moe.errors import InputError
from lightning_moe.files import remove, write_json

VERSION = 1

PARTIAL = ".partial"
"""Of a run folder: what holds unfinished work."""

PACKAGES = ("lightning-moe", "torch", "lightning", "transformers", "torchmetrics")


class RunFolder:
    """Results of commands in one folder, one request per command.

    ``<command>.json`` holds the last results of each command, ``summary.json`` those of the last command. A folder with
    the same command's results of another request is refused; ``overwrite`` replaces them.
    """

    def __init__(self, folder: str, command: str, request: Mapping[str, Any], overwrite: bool) -> None:
        self.folder, self.command, self.request = Path(folder), command, dict(request)
        self._overwrite = overwrite
        self._start = time.perf_counter()
        for place in (self.folder, *self.folder.parents):
            if place.exists() and not place.is_dir():
                raise InputError(f"--out {folder}: {place} is a file; give a folder.")
        found = self._read(self._results_file)
        if found is not None and not overwrite and found.get("request") != self._plain(self.request):
            asked = found.get("request") or {}
            differs = [k for k in {**asked, **self.request} if asked.get(k) != self._plain(self.request).get(k)]
            raise InputError(
                f"--out {folder}: it holds the results of another `{command}` (other {', '.join(sorted(differs))}); "
                "give another folder, or --overwrite true to replace them."
            )
        whole = found is not None and not overwrite and self._files(found.get("files", ())) == found.get("files", {})
        self.finished = found | {"repeated": True} if found is not None and whole else None
        """The results, if this very request has been carried out here before and its files are still its own."""
        asked_before = found is not None and found.get("request") == self._plain(self.request)
        self.begun = found is not None and asked_before and found.get("finished") is False
        """Whether this very request was begun here and did not come to its end; of commands that record it."""

    @property
    def _results_file(self) -> Path:
        return self.folder / f"{self.command}.json"

    def partial(self, **also: Any) -> Path:
        """The folder for unfinished work of this very request; its name is made from the request.

        ``also`` names what may change between requests that give the same results, but not within one piece of work.
        """
        return self.folder / PARTIAL / f"{self.command}-{self._digest}-{self._hashed(also)}"

    def begin(self, *files: str) -> None:
        """Forget the results that are about to be replaced, so that a kill never leaves them beside other files.

        ``files`` are what goes with them and is not written anew.
        """
        for file in (self._results_file, *(self.folder / name for name in files)):
            file.unlink(missing_ok=True)

    def save(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write the results and return them: command, figures, what was asked, versions, seconds."""
        results = {
            "version": VERSION,
            "command": self.command,
            **figures,
            "seconds": round(time.perf_counter() - self._start, 3),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "request": self.request,
        }
        write_json(self._results_file, results)
        return results

    def finish(self, figures: Mapping[str, Any], *files: str) -> dict[str, Any]:
        """Write the results, also as those of the last command; unfinished work of this request is no longer needed.

        That of other requests stays, since nobody has said that it may go. ``files`` are those that another command
        may replace, so that these results would be there without them.
        """
        results = self.save({**figures, "files": self._files(files)} if files else figures)
        write_json(self.folder / "summary.json", results)
        partial = self.folder / PARTIAL
        # What a killed removal has left begins with a dot.
        for unfinished in sorted(partial.glob(f"*{self.command}-{'*' if self._overwrite else self._digest}-*")):
            remove(unfinished)
        with suppress(OSError):  # some is left, or there was none
            partial.rmdir()
        if any(partial.glob(f"{self.command}-*")):
            print(
                f"note: {partial} keeps unfinished work of another `{self.command}`, which goes on with --overwrite "
                "true; if you do not want it, remove that folder."
            )
        return results

    def _files(self, names: Iterable[str]) -> dict[str, str]:
        """What is in them, in short; one that is missing is left out."""
        places = {name: self.folder / name for name in names}
        return {
            name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in places.items() if file.is_file()
        }

    @property
    def _digest(self) -> str:
        return self._hashed(self.request)

    @classmethod
    def _hashed(cls, value: Any) -> str:
        return hashlib.sha256(json.dumps(cls._plain(value), sort_keys=True).encode()).hexdigest()[:12]

    @staticmethod
    def _plain(value: Any) -> Any:
        """As it looks after a trip through JSON."""
        return json.loads(json.dumps(value))

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return value
