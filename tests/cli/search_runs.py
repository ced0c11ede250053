"""``search`` on the tiny checkpoint: how it is asked for, what it wrote, and which windows it saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from lightning_moe.cli.main import main
from lightning_moe.search.diep import DiEPSearch

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
UPDATES = 7
RESULTS = ("scores.json", "plan.json", "importance.json", "figures/importance.csv")


def on(checkpoint: Path, text: Path) -> list[object]:
    """Model and text: 8 full windows, 4 batches an epoch."""
    data = ["--data.path", text / "harbour.txt", "--data.seq_len", 16, "--data.samples", 8, "--data.batch_size", 2]
    return [*QUIET, "--model.path", checkpoint, *data]


def search_args(checkpoint: Path, text: Path, *more: object) -> list[object]:
    return ["search", *on(checkpoint, text), "--updates", UPDATES, *more]


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


class Killed(RuntimeError):
    """Stands for a kill: nothing in the package knows it."""


class Windows:
    """The windows that each batch of a search saw, and a kill before the batch of one number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kill_before: int | None = None) -> None:
        self.seen: list[list[list[int]]] = []
        stock = DiEPSearch.training_step

        def step(search: DiEPSearch, batch: dict[str, Tensor], batch_idx: int) -> None:
            if search._batches == kill_before:
                raise Killed
            self.seen.append(batch["input_ids"].tolist())
            stock(search, batch, batch_idx)

        monkeypatch.setattr(DiEPSearch, "training_step", step)


Whole = Callable[..., tuple[Path, list[list[list[int]]]]]


def whole_searches(checkpoint: Path, text: Path, factory: pytest.TempPathFactory) -> Whole:
    """Unbroken searches with some arguments, and the windows of their batches; each is made once."""
    made: dict[tuple[object, ...], tuple[Path, list[list[list[int]]]]] = {}

    def search(*more: object) -> tuple[Path, list[list[list[int]]]]:
        if more not in made:
            folder = factory.mktemp("searched")
            with pytest.MonkeyPatch.context() as patch:
                windows = Windows(patch)
                main([str(arg) for arg in search_args(checkpoint, text, *more, "--out", folder)])
            made[more] = folder, windows.seen
        return made[more]

    return search
