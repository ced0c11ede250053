"""Weight files: a stream of tensors becomes the safetensors files of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 << 30
"""Largest weight file written, and about the most memory used."""

NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
"""Decoder layer in the name of a tensor, on disk and in memory."""

LAYER = re.compile(NUMBER.pattern + r"(\w+)\.")
"""The same with the component after it."""


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or several files of about ``shard_bytes`` and their index, as tensors come."""
    shard: dict[str, Tensor] = {}
    shard_names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shard_names):05d}", metadata={"format": "pt"})
        shard_names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shard_names) == 1:
        (folder / "shard-00000").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shard_names):
        file = f"model-{number + 1:05d}-of-{len(shard_names):05d}.safetensors"
        (folder / f"shard-{number:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
