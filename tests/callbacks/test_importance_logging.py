"""ImportanceFigures with anybody's logger, and where no step is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_moe.callbacks import ImportanceFigures
from tests.callbacks.importance_fit import (
    FIGURES,
    STEPS,
    Foreign,
    Gates,
    fit,
)


class Board(DummyLogger):
    """As TensorBoardLogger: figures go to the experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, tuple[Any, int]] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @property
    def experiment(self) -> Any:
        return self

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.got[tag] = figure, global_step


class Images(Board):
    """As WandbLogger: a list of images under a key."""

    add_figure = None  # type: ignore[assignment]

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        assert len(images) == 1 and step is not None
        self.got[key] = images[0], step


def test_each_logger_gets_what_it_takes(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    board, images = Board(), Images()
    loggers = [board, images, CSVLogger(tmp_path), DummyLogger()]
    fit(Foreign(Gates()), ImportanceFigures(ratio=0.5), logger=loggers)
    for logger in (board, images):
        assert set(logger.got) == {f"importance/{name}" for name in FIGURES}
        assert {step for _, step in logger.got.values()} == {2 * STEPS}
    assert all(isinstance(figure, Figure) for figure, _ in board.got.values())
    for image, _ in images.got.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 10
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(Foreign(Gates()), ImportanceFigures(), logger=TensorBoardLogger(tmp_path))
    (events,) = tmp_path.rglob("events*")
    assert set(EventAccumulator(str(events)).Reload().Tags()["images"]) == {f"importance/{name}" for name in FIGURES}


def test_killed_between_the_last_checkpoint_and_the_end(tmp_path: Path) -> None:
    """With no step left Lightning starts no training; the figures are drawn all the same."""
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Foreign(Gates()), ImportanceFigures(tmp_path / "whole", ratio=0.5), checkpoint, enable_checkpointing=True)
    told = Board()
    second = ImportanceFigures(tmp_path / "parts", ratio=0.5)
    fit(Foreign(Gates()), second, ckpt_path=tmp_path / "last.ckpt", logger=told)
    assert set(told.got) == {f"importance/{name}" for name in FIGURES}
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name
