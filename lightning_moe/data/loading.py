"""Batches that are the same on any number of ranks, and that continue where they stopped."""

from __future__ import annotations

from collections.abc import Iterator

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


class ResumableLoader:
    """Batches whose position travels in Lightning's checkpoints; each time through is the next epoch.

    It holds a DataLoader rather than being one: Lightning takes apart and rebuilds the DataLoaders it is given.
    """

    def __init__(self, dataset: PackedText, batches: RankBatches) -> None:
        self.dataset, self.batches = dataset, batches
        # Without a generator of its own, each time through would take a number from torch's, which saves hold.
        own = torch.Generator()
        self._loader: DataLoader[dict[str, Tensor]] = DataLoader(dataset, batch_sampler=batches, generator=own)
        self._done = 0
        self._begun = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # At the start, not the end: Lightning counts batches and does not come back for the end of an epoch.
        self.batches.epoch += self._begun
        self._begun = True
        self._done = self.batches.start
        for batch in self._loader:
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches done in it; at the last batch of an epoch, the start of the next."""
        finished = self._done == len(self)
        return {"epoch": self.batches.epoch + finished, "done": 0 if finished else self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in the epoch and at the batch that ``state`` names."""
        self.batches.epoch, self.batches.start, self._done = state["epoch"], state["done"], state["done"]
        self._begun = False
