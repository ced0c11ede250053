"""What each rank keeps of a pass, wherever it is killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_moe.callbacks import batch_saves
from lightning_moe.callbacks.batch_saves import BatchSaves


class Rank:
    """One of two that share a folder; both do the same, one after the other."""

    def __init__(self, number: int, folder: Path) -> None:
        self.trainer: Any = SimpleNamespace(global_rank=number, strategy=SimpleNamespace(barrier=lambda: None))
        self.saves = BatchSaves(folder, "sums")

    def save(self, done: int) -> None:
        self.saves.save(self.trainer, done, {"sum": torch.tensor([float(done)])})

    def load(self, done: int) -> float:
        return self.saves.load(self.trainer, done)["sum"].item()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    both = [Rank(number, tmp_path) for number in (0, 1)]

    def gathered(mine: list[int]) -> list[list[int]]:
        return [list(one.saves._files(one.trainer.global_rank)) for one in both]

    monkeypatch.setattr(batch_saves, "gathered", gathered)
    return both


def last(ranks: list[Rank]) -> list[int]:
    return [one.saves.last(one.trainer) for one in ranks]


def test_one_save_stays(ranks: list[Rank], tmp_path: Path) -> None:
    assert last(ranks) == [0, 0]
    for done in (1, 2, 3):
        for one in ranks:
            one.save(done)
    assert last(ranks) == [3, 3] and len(list(tmp_path.iterdir())) == 2


def test_a_rank_that_was_ahead_loses_nothing(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the saves of two ranks, and then again after the same batch."""
    for one in ranks:
        one.save(1)

    def killed() -> None:
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ranks[0].trainer.strategy, "barrier", killed)
        ranks[0].save(2)
    assert last(ranks) == [1, 1]
    for one in ranks:
        one.save(2)
    assert last(ranks) == [2, 2]
    assert [one.load(2) for one in ranks] == [2.0, 2.0]
