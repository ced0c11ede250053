"""BatchSaves: what each rank has summed after so many batches, on disk, so that a killed pass goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moe.files import replaced_file
from lightning_moe.moe.ranks import gathered


class BatchSaves:
    """Sums of a pass over batches, a file for each rank and save.

    A kill may come between the saves of two ranks: a pass goes on from the last batch that all have saved.

    Args:
        folder: Seen by all ranks; None saves nothing. Whoever gave it removes it once the result is safe.
        name: What the files begin with.
        every: Batches between two saves.
    """

    def __init__(self, folder: Path | None, name: str, every: int = 1) -> None:
        self.folder, self.name, self.every = folder, name, every

    def _files(self, rank: int) -> dict[int, Path]:
        """The saves of a rank, by the number of batches summed."""
        if self.folder is None:
            return {}
        files = self.folder.glob(f"{self.name}-{rank}-*.safetensors")
        return {int(file.stem.rpartition("-")[2]): file for file in files}

    def last(self, trainer: Trainer) -> int:
        """Batches that all ranks have summed and saved; all must call it, from a callback's ``setup`` on."""
        return max(set.intersection(*map(set, gathered(list(self._files(trainer.global_rank))))), default=0)

    def load(self, trainer: Trainer, done: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What this rank had summed after ``done`` batches."""
        return load_file(self._files(trainer.global_rank)[done], str(device))

    def save(self, trainer: Trainer, done: int, sums: Mapping[str, Tensor]) -> None:
        """Keep the sums after ``done`` batches, if it is time to."""
        if self.folder is None or done % self.every:
            return
        earlier = self._files(trainer.global_rank)
        with replaced_file(self.folder / f"{self.name}-{trainer.global_rank}-{done}.safetensors") as beside:
            save_file(dict(sums), beside)
        trainer.strategy.barrier()  # the earlier one is what counts until all have this one
        earlier.pop(done, None)  # of a rank that was ahead when the pass was killed
        for file in earlier.values():
            file.unlink()
