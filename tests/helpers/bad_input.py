"""Bad command lines, and what must hold of each: one line that names the cause, exit code 2, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.checkpoint import Commands, contents
from tests.helpers.command_runs import QUIET

LAYER = "model.layers.0.mlp"


@dataclass(frozen=True)
class Place:
    """What a bad command line can be made of."""

    tmp: Path
    model: Path
    text: Path
    stats: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def score(self, *args: object) -> list[object]:
        return ["score", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def prune(self, *args: object) -> list[object]:
        """From text."""
        return ["prune", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def cut(self, *args: object) -> list[object]:
        """From statistics."""
        return ["prune", *QUIET, "--model.path", self.model, "--stats", self.stats, "--out", self.out, *args]

    def by_scores(self, file: Path) -> list[object]:
        return ["prune", *QUIET, "--model.path", self.model, "--scores", file, "--out", self.out]

    def by_plan(self, value: object, **keys: object) -> list[object]:
        content = value if isinstance(value, str) else json.dumps({"keep": value, **keys})
        file = self.file(f"{len(list(self.tmp.glob('*plan.json')))}plan.json", content)
        return ["prune", *QUIET, "--model.path", self.model, "--plan", file, "--out", self.out]

    def evaluate(self, *args: object) -> list[object]:
        return ["evaluate", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def compare(self, *args: object) -> list[object]:
        return ["compare", *self.evaluate(*args)[1:]]

    def file(self, name: str, content: str | bytes) -> Path:
        file = self.tmp / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file


def run_folder(place: Place, *files: str) -> Path:
    """The folder of some command that left these files, and whatever is in them."""
    for file in (place.tmp / "ran" / name for name in files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return place.tmp / "ran"


Case = Callable[[Place], list[object]]
Cases = dict[str, tuple[Case, list[str]]]
"""By name: what to run, and what the line must name."""


def assert_refused(run: Commands, place: Place, make: Case, named: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.chdir(place.tmp)
    args = make(place)
    before = contents(place.tmp)
    folders = sorted(place.tmp.rglob("*"))
    result = run(*args)
    assert result.code == 2, result.out
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    for part in named:
        assert part in result.err, result.err
    assert contents(place.tmp) == before
    assert sorted(place.tmp.rglob("*")) == folders
