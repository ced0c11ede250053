"""Batches of anybody's datamodule: which loader they are of, and that its data is prepared once in a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule

from lightning_moe.callbacks import ExpertPruning
from lightning_moe.callbacks.batches import batches_of, prepare
from lightning_moe.errors import InputError
from tests.callbacks.foreign_fit import Foreign, calibration, fit, loader, small_model


class Counting(LightningDataModule):
    """Says how often it was prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = 0

    def prepare_data(self) -> None:
        self.prepared += 1

    def train_dataloader(self) -> Any:
        return loader(6)

    def predict_dataloader(self) -> Any:
        return calibration()


@pytest.mark.parametrize("loaders", ["predict", "validation"])
def test_text_from_a_datamodule(tmp_path: Path, loaders: str) -> None:
    """Its predict loader, or else that of validation, set up for it."""
    asked: list[str] = []

    class Predicting(LightningDataModule):
        def setup(self, stage: str) -> None:
            asked.append(stage)

        def predict_dataloader(self) -> Any:
            return calibration()

    class Validating(LightningDataModule):
        def setup(self, stage: str) -> None:
            asked.append(stage)

        def val_dataloader(self) -> Any:
            return calibration()

    found, plain = (
        ExpertPruning(text, 0.5, method="ean", start=1)
        for text in ((Predicting if loaders == "predict" else Validating)(), calibration())
    )
    for pruning in (found, plain):
        fit(Foreign(small_model()), tmp_path, pruning, max_steps=1)
    assert asked == ["predict" if loaders == "predict" else "validate"]
    assert found.records[0].scores == plain.records[0].scores


@pytest.mark.parametrize("evaluated", ["same", "other", "none"])
def test_once_however_many_rounds(tmp_path: Path, evaluated: str) -> None:
    text = Counting()
    evaluation = {"same": text, "other": Counting(), "none": None}[evaluated]
    pruning = ExpertPruning(text, 0.5, [0.25, 0.5], "ean", start=1, every=2, evaluation=evaluation)
    fit(Foreign(small_model()), tmp_path, pruning)
    assert len(pruning.records) == 2
    assert {one.prepared for one in (text, evaluation) if one is not None} == {1}


def test_the_fits_own_is_prepared_by_the_fit(tmp_path: Path) -> None:
    text = Counting()
    pruning = ExpertPruning(text, 0.5, method="ean", start=1)
    fit(Foreign(small_model()), tmp_path, pruning, data=text)
    assert text.prepared == 1


@pytest.mark.parametrize("per_node", [True, False])
def test_one_process_of_each_node_or_of_all_prepares(per_node: bool) -> None:
    class Rank:
        datamodule = None

        def __init__(self, node_rank: int, local_rank: int) -> None:
            self.node_rank, self.local_rank = node_rank, local_rank

    text = Counting()
    text.prepare_data_per_node = per_node
    found = []
    for node in range(2):
        for local in range(2):
            before = text.prepared
            prepare([text], Rank(node, local))  # type: ignore[arg-type]
            found.append(text.prepared - before)
    assert found == ([1, 0, 1, 0] if per_node else [1, 0, 0, 0])


def test_a_datamodule_without_loaders_is_refused() -> None:
    with pytest.raises(InputError, match="LightningDataModule has neither a predict nor a validation loader"):
        batches_of(LightningDataModule())
