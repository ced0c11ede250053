"""What ExpertUsageMonitor gives to loggers: the figures of every look, and a picture of the load before and after."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.usage_panels import MOST_BARS, load_before_and_after
from lightning_moe.stats.usage import mean_load
from tests.callbacks.metric_logs import Logs
from tests.callbacks.router_fit import STEPS, loader, trainer
from tests.callbacks.usage_fit import Foreign, figures_of, summed
from tests.helpers.training_models import training_model


class UsageLogs(Logs):
    def __init__(self) -> None:
        super().__init__("expert_usage")

    def under(self, prefix: str) -> list[dict[str, float]]:
        return [metrics for _, metrics in self.metrics if all(name.startswith(f"{prefix}/") for name in metrics)]


# --------------------------------------------------------------------------------------------- logging


def test_what_is_logged(tmp_path: Path) -> None:
    """The figures of every look, of each layer and over all, and nothing else."""
    logs, module, monitor = UsageLogs(), Foreign(training_model(pruned=True)), ExpertUsageMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, logger=logs, log_every_n_steps=1)
    run.fit(module, loader(), loader(seed=1))
    trained = logs.under("expert_usage")
    assert len(trained) == STEPS
    for found, (_, counts) in zip(trained, [one for one in module.batches if one[0] == "train"], strict=True):
        assert found == pytest.approx(figures_of(counts, "expert_usage"), rel=1e-5, abs=1e-6)
    validated = logs.under("expert_usage_val")
    assert len(validated) == 1
    expected = figures_of(summed(module.batches, "val"), "expert_usage_val")
    assert validated[0] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(trained) + len(validated) == len(logs.metrics)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if name in expected}
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_every_look_reaches_the_logger(tmp_path: Path) -> None:
    """Also where the trainer logs less often than we look, as it does by default, every 50 steps."""
    logs, monitor = UsageLogs(), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor, logger=logs).fit(Foreign(training_model()), loader())
    found = logs.under("expert_usage")
    assert len(found) == len(monitor.looks) == STEPS // 2
    for metrics, (_, _, counts) in zip(found, monitor.looks, strict=True):
        assert metrics == pytest.approx(figures_of(counts, "expert_usage"), rel=1e-5, abs=1e-6)


def test_a_logger_of_lightning(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = ExpertUsageMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, logger=logger, log_every_n_steps=1)
    run.fit(Foreign(training_model()), loader())
    with (tmp_path / "metrics.csv").open() as lines:
        found = [float(row["expert_usage/cv"]) for row in csv.DictReader(lines) if row["expert_usage/cv"]]
    assert found == pytest.approx([mean_load(counts)["cv"] for _, _, counts in monitor.looks], rel=1e-5)


# ---------------------------------------------------------------------------------------------- the picture


class Board:
    def __init__(self) -> None:
        self.figures: list[tuple[str, Figure, int]] = []

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append((tag, figure, global_step))


class TakesFigures(UsageLogs):
    def __init__(self) -> None:
        super().__init__()
        self.board = Board()

    @property
    def experiment(self) -> Board:
        return self.board


class TakesImages(UsageLogs):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.extend((key, image, step) for image in images)


def titles(figure: Figure) -> tuple[list[str], list[str]]:
    seen = [axes for axes in figure.axes if axes.get_visible()]
    return [axes.get_ylabel() for axes in seen if axes.get_ylabel()], [axes.get_title() for axes in seen]


@pytest.mark.parametrize("validate", [False, True], ids=["train", "val"])
def test_loggers_get_the_figure(tmp_path: Path, validate: bool) -> None:
    """Of the first and the last look at validation text, or at training text where there was none."""
    board, images = TakesFigures(), TakesImages()
    monitor = ExpertUsageMonitor(every_n_steps=1)
    loaders = (loader(seed=1),) if validate else ()
    run = trainer(tmp_path, monitor, logger=[board, images, UsageLogs()], max_epochs=2)
    run.fit(Foreign(training_model()), loader(), *loaders)
    [(tag, figure, step)] = board.board.figures
    assert (tag, step) == ("expert_usage/before_and_after", 2 * STEPS)
    first, last = ("step 4", "step 8") if validate else ("step 1", "step 8")
    assert titles(figure)[0] == [first, last]
    same = [counts for kind, _, counts in monitor.looks if kind == ("val" if validate else "train")]
    for moment, counts in ((f"{first} cv", same[0]), (f"{last} cv", same[-1])):
        assert f"{moment} {mean_load(counts)['cv']:.2f}" in figure.get_suptitle()
    [(key, image, at)] = images.images
    assert (key, at) == (tag, step)
    assert image.ndim == 3 and image.shape[-1] == 3 and image.std() > 0


@pytest.mark.parametrize("layers", [1, 2, 7, 13])
def test_the_panels(layers: int) -> None:
    """Two rows of one panel per layer; bars are shares over an even share, largest first; sizes may have changed."""
    sizes = [8, MOST_BARS + 1, 4]
    before = {f"layers.{turn}": [float(i % 5) for i in range(8)] for turn in range(layers)}
    after = {f"layers.{turn}": [float(i + 1) for i in range(sizes[turn % 3])] for turn in range(layers)}
    figure = load_before_and_after(before, after, ("start", "end"))
    rows_of_panels = -(-layers // 6)
    labels, names = titles(figure)
    assert labels == ["start", "end"] * rows_of_panels
    assert len(names) == 2 * layers
    assert sum(name.startswith("layer ") for name in names) == layers
    first = next(axes for axes in figure.axes if axes.get_visible())
    # Loads 0 1 2 3 4 0 1 2 of mean 13 / 8.
    expected = sorted([8 / 13 * (i % 5) for i in range(8)], reverse=True)
    assert [bar.get_height() for bar in first.patches] == pytest.approx(expected)


def test_a_panel_of_no_token() -> None:
    nothing = {"layers.0": [0.0, 0.0]}
    assert "cv 1.00" in load_before_and_after(nothing, nothing).get_suptitle()
