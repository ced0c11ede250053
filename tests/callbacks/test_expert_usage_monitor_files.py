"""What ExpertUsageMonitor writes: a table and a picture, the same after a kill as of one run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.stats.usage import FIGURES, load_figures
from tests.callbacks.router_fit import STEPS, Windows, loader, trainer
from tests.callbacks.usage_fit import Foreign, summed
from tests.helpers.training_models import training_model


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "expert_usage.csv").open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_files(tmp_path: Path) -> None:
    """A row per look and layer, with the counts themselves; a whole PNG; and nothing half written beside them."""
    monitor = ExpertUsageMonitor(str(tmp_path / "deep" / "usage"), every_n_steps=2)
    trainer(tmp_path, monitor).fit(Foreign(training_model(pruned=True)), loader(), loader(seed=1))
    folder = tmp_path / "deep" / "usage"
    assert sorted(file.name for file in folder.iterdir()) == ["expert_usage.csv", "expert_usage.png"]
    png = (folder / "expert_usage.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB\x60\x82")
    expected = [(look, name, count_E) for look in monitor.looks for name, count_E in look[2].items()]
    found = rows(folder)
    assert len(found) == len(expected) == 3 * 2
    for row, ((kind, step, _), name, count_E) in zip(found, expected, strict=True):
        assert list(row) == ["kind", "step", "layer", *FIGURES, "tokens per expert"]
        assert (row["kind"], int(row["step"]), row["layer"]) == (kind, step, name)
        assert [int(count) for count in row["tokens per expert"].split()] == count_E
        figures = load_figures(count_E)
        assert {name: float(row[name]) for name in FIGURES} == pytest.approx(figures, rel=1e-5, abs=1e-9)


def test_files_of_an_earlier_fit_are_replaced(tmp_path: Path) -> None:
    for steps in (1, 2):
        monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=1)
        trainer(tmp_path, monitor, max_steps=steps).fit(Foreign(training_model()), loader())
        assert len(rows(tmp_path / "usage")) == 2 * steps


def test_nothing_is_written_without_a_folder_or_a_look(tmp_path: Path) -> None:
    trainer(tmp_path, ExpertUsageMonitor(every_n_steps=1)).fit(Foreign(training_model()), loader())
    trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage")).fit(Foreign(training_model()), loader())  # 4 steps of 50
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- resuming


class ImageLogger(DummyLogger):
    """Takes pictures, as that of Weights & Biases does."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[str, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.pictures.append((key, step))


def one_batch_again_and_again() -> DataLoader[dict[str, Tensor]]:
    """A plain loader starts from its first batch when a fit goes on in the middle of an epoch."""
    windows = Windows(masked=True, seed=0)
    return DataLoader([windows[index % 2] for index in range(2 * STEPS)], batch_size=2)  # type: ignore[arg-type]


class Killed(Foreign):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("killed")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("every", [2, 3])
def test_a_resumed_fit_has_the_looks_of_one_run(tmp_path: Path, every: int) -> None:
    """Killed in step 8, when the last checkpoint is that of step 6, at which there is a look."""
    data = one_batch_again_and_again()
    whole = ExpertUsageMonitor(tmp_path / "whole", every)
    trainer(tmp_path, whole, max_epochs=2).fit(Foreign(training_model()), data, loader(seed=1))
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, save_on_train_epoch_end=True)
    first = ExpertUsageMonitor(tmp_path / "parts", every)
    with pytest.raises(RuntimeError, match="killed"):
        run = trainer(tmp_path, first, checkpoint, max_epochs=2, enable_checkpointing=True)
        run.fit(Killed(training_model()), data, loader(seed=1))
    assert not (tmp_path / "parts").exists()
    second = ExpertUsageMonitor(tmp_path / "parts", every)
    run = trainer(tmp_path, second, max_epochs=2)
    run.fit(Foreign(training_model()), data, loader(seed=1), ckpt_path=tmp_path / "last.ckpt")
    assert second.looks == whole.looks
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == ["expert_usage.csv", "expert_usage.png"]
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_killed_between_the_last_checkpoint_and_the_end(tmp_path: Path) -> None:
    """With no step left Lightning starts no training; the files are written and the logger is told all the same."""

    class Ends(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == STEPS:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    whole = ExpertUsageMonitor(tmp_path / "whole", 2)
    trainer(tmp_path, whole, Ends(), max_steps=STEPS).fit(Foreign(training_model()), loader())
    second, told = ExpertUsageMonitor(tmp_path / "parts", 2), ImageLogger()
    run = trainer(tmp_path, second, max_steps=STEPS, logger=told)
    module = Foreign(training_model())
    run.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert module.batches == []
    assert told.pictures == [("expert_usage/before_and_after", STEPS)]
    for file in ("expert_usage.csv", "expert_usage.png"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_one_callback_serves_one_fit_after_another(tmp_path: Path) -> None:
    """The second fit is looked at from its first steps on."""
    monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=2)
    for seed in (0, 1):
        module = Foreign(training_model())
        trainer(tmp_path, monitor).fit(module, loader(seed=seed))
        assert [step for _, step, _ in monitor.looks[-2:]] == [2, 4]
        assert monitor.looks[-2][2] == summed(module.batches[:2], "train")
        assert monitor.last == summed(module.batches[2:], "train")
