"""Batches that are the same on any number of ranks, and that continue where they stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_moe.data.packing import PackedText


class RankBatches(Sampler[list[int]]):
    """Batches of window numbers for one rank.

    The order depends on seed and epoch alone; batch ``b`` of rank ``r`` takes the windows
    ``(b * world_size + r) * batch_size ...``, so that ``world_size`` ranks with ``batch_size`` see at each step
    what one rank with ``world_size * batch_size`` sees. Every rank gets the same number of batches: what is
    missing at the end is filled with -1, a blank window that counts nowhere (``drop_last`` drops it instead).
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.num_windows, self.batch_size = num_windows, batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        self.start = 0
        """Batches of this epoch that were done before a restart."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        step = self.batch_size * self.world_size
        return self.num_windows // step if self.drop_last else -(-self.num_windows // step)

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_windows, generator=generator).tolist()
        else:
            order = list(range(self.num_windows))
        order += [-1] * (len(self) * self.batch_size * self.world_size - len(order))
        start, self.start = self.start, 0
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose position travels in Lightning's checkpoints."""

    def __init__(self, dataset: PackedText, batches: RankBatches) -> None:
        super().__init__(dataset, batch_sampler=batches)
        self.batches = batches
        self.done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.done = self.batches.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        # At the end of an epoch the next one starts from its first batch.
        return {"epoch": self.batches.epoch, "done": self.done % max(len(self.batches), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.set_epoch(state["epoch"])
        self.batches.start = state["done"]
