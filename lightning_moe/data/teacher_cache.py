"""TeacherCache: what a model that no longer exists said of each token, on disk."""

# N windows, S window length in tokens, C candidates per token, V vocabulary

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.files import write_json

VERSION = 1

FILES = {"ids.npy": np.int32, "values.npy": np.float16}


class TeacherCache:
    """The ``C`` most likely next tokens of every place of a text, with their log-probabilities.

    Two memory-mapped files in a folder, 6 bytes per candidate: 64 of them take 0.4 GB per million tokens, whatever
    the teacher's size. The distribution that is distilled is that over these tokens and, as one more, all others.

    Args:
        folder: Of this cache alone.
        windows: N.
        seq_len: S.
        candidates: C.
        fingerprint: Of the text; a cache of another text is refused.
    """

    def __init__(self, folder: Path, windows: int, seq_len: int, candidates: int, fingerprint: str) -> None:
        self.folder, self.shape = folder, (windows, seq_len, candidates)
        self._stamp = {"version": VERSION, "shape": list(self.shape), "text": fingerprint}

    @property
    def complete(self) -> bool:
        """Whether the cache is there as a whole; it is stamped last."""
        file = self.folder / "teacher.json"
        if not file.is_file():
            return False
        if json.loads(file.read_text()) != self._stamp:
            raise InputError(f"{self.folder}: a teacher's cache of another text; remove the folder.")
        return True

    def create(self) -> None:
        """Make room for all windows; one rank calls it, and the others wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, dtype in FILES.items():
            np.lib.format.open_memmap(self.folder / name, "w+", dtype, self.shape).flush()

    def finish(self) -> None:
        """Say that all windows are written."""
        write_json(self.folder / "teacher.json", self._stamp)

    def write(self, window_B: Tensor, logits_BSV: Tensor) -> None:
        """Keep the most likely tokens of these windows; blank ones (below 0) are left out."""
        for window, logits_SV in zip(window_B.tolist(), logits_BSV, strict=True):
            if window >= 0:
                top = logits_SV.float().log_softmax(-1).topk(self.shape[2], dim=-1)
                self._put("ids.npy", window, top.indices)
                self._put("values.npy", window, top.values)

    def _put(self, name: str, window: int, values_SC: Tensor) -> None:
        """Write a row, and no page more: nodes share these files, and NFS writes mapped pages back as wholes."""
        row = values_SC.cpu().numpy().astype(FILES[name])
        start = np.lib.format.open_memmap(self.folder / name, "r").offset
        with (self.folder / name).open("r+b") as file:
            file.seek(start + window * row.nbytes)
            file.write(row.tobytes())

    def read(self, window_B: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids ``(B, S, C)`` and log-probabilities of these windows, on the device of ``window_B``."""
        ids, values = (np.lib.format.open_memmap(self.folder / name, "r") for name in FILES)
        rows = np.asarray(window_B.clamp(min=0).cpu())
        return (
            torch.from_numpy(ids[rows]).long().to(window_B.device),
            torch.from_numpy(values[rows]).float().to(window_B.device),
        )
