"""The run folder: what a command was asked, what it found, and whether it may write here."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lightning_moe.errors import InputError
from lightning_moe.files import write_json

PACKAGES = ("lightning-moe", "torch", "lightning", "transformers", "torchmetrics")


class RunFolder:
    """Results of commands in one folder, one request per command.

    ``<command>.json`` holds the last results of each command, ``summary.json`` those of the last command. A folder
    with the same command's results for another request is refused; ``overwrite`` replaces them.
    """

    def __init__(self, folder: str, command: str, request: Mapping[str, Any], overwrite: bool) -> None:
        self.folder, self.command, self.request = Path(folder), command, dict(request)
        self._start = time.perf_counter()
        self._overwrite = overwrite
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out {folder}: a file; give a folder.")
        found = self._read(self._results_file)
        if found is not None and not overwrite and found.get("request") != self._plain(self.request):
            asked = found.get("request") or {}
            differs = [k for k in {**asked, **self.request} if asked.get(k) != self._plain(self.request).get(k)]
            raise InputError(
                f"--out {folder}: it holds the results of another `{command}` (other {', '.join(sorted(differs))}); "
                "give another folder, or --overwrite true to replace them."
            )
        self.finished = found if not overwrite else None
        """The results, if this very request has been carried out here before."""
        if self.finished:
            self._say(self.finished)
            Console().print("This very request was carried out here before; --overwrite true does it again.")

    @property
    def _results_file(self) -> Path:
        return self.folder / f"{self.command}.json"

    def partial(self, trainer: Trainer) -> Path:
        """The folder for unfinished work of this request; every rank asks, rank zero clears another request's."""
        folder = self.folder / ".partial"
        asked = {"command": self.command, **self._plain(self.request)}
        if trainer.is_global_zero and (self._overwrite or self._read(folder / "request.json") != asked):
            for leftover in folder.glob("*"):
                leftover.unlink()
            write_json(folder / "request.json", asked)
        trainer.strategy.barrier("partial folder is ready")
        return folder

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Write the results and print them: command, figures, what was asked, versions, seconds."""
        results = {
            "command": self.command,
            **figures,
            "seconds": round(time.perf_counter() - self._start, 3),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "request": self.request,
        }
        for file in (self._results_file, self.folder / "summary.json"):
            write_json(file, results)
        shutil.rmtree(self.folder / ".partial", ignore_errors=True)
        self._say(results)

    def _say(self, results: Mapping[str, Any]) -> None:
        """Print the figures, and where they are."""
        table = Table(show_header=False, title=self.command, title_justify="left")
        for name, value in results.items():
            if name in ("command", "versions", "request", "methods", "models"):
                continue
            if isinstance(value, dict):
                for inner, number in value.items():
                    table.add_row(f"{name}: {inner}", _readable(number))
            else:
                table.add_row(name, _readable(value))
        Console().print(table)
        Console(soft_wrap=True).print(f"Results are in {self.folder}, figures in {self._results_file}.")

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


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)
