"""Statistics on disk: one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.files import replaced_file
from lightning_moe.moe.layers import LayerShape
from lightning_moe.stats.layer_stats import GRADIENTS, TENSORS, LayerStats

VERSION = 4

LACKING = {"2": ("logit_products_EE", "layer_cosine", "block_cosine"), "3": ("layer_cosine", "block_cosine")}
"""Older versions that are read, and what their files do not have: it is NaN then, and who needs it says so."""


@dataclass(frozen=True)
class ModelStats:
    """The statistics of all MoE layers, and where they come from."""

    model_id: str
    data_fingerprint: str
    layers: Sequence[LayerStats]
    dtype: str = "auto"
    """Of the weights while they were observed, as ``--model.dtype`` names it."""

    @property
    def has_gradients(self) -> bool:
        """Whether all layers have figures of gradients."""
        return all(layer.has_gradients for layer in self.layers)

    @property
    def has_cosines(self) -> bool:
        """Whether all layers have the cosines of the residual stream, which older files lack."""
        return not any(bool(layer.layer_cosine.isnan()) for layer in self.layers)

    def save(self, file: Path) -> None:
        names = (*TENSORS, *(GRADIENTS if self.has_gradients else ()))
        tensors = {
            f"{layer.shape.name}:{name}": getattr(layer, name).contiguous() for layer in self.layers for name in names
        }
        metadata = {
            "version": str(VERSION),
            "model_id": self.model_id,
            "data_fingerprint": self.data_fingerprint,
            "dtype": self.dtype,
            "layers": json.dumps([asdict(layer.shape) for layer in self.layers]),
        }
        with replaced_file(file) as beside:
            save_file(tensors, beside, metadata=metadata)


def load_stats(file: Path) -> ModelStats:
    """Read statistics. Raises ``InputError`` for a missing, foreign or newer file."""
    if not file.is_file():
        raise InputError(f"--stats {file}: no such file; `lightning-moe score` writes one.")
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            found = metadata.get("version", "none")
            if found != str(VERSION) and found not in LACKING:
                raise InputError(f"--stats {file}: version {found}, this program reads {VERSION}; score again.")
            layers, keys = [], set(stored.keys())
            for fields in json.loads(metadata["layers"]):
                shape = LayerShape(**fields)
                lacking = LACKING.get(found, ())
                names = [name for name in TENSORS if name not in lacking]
                names += [name for name in GRADIENTS if f"{shape.name}:{name}" in keys]
                tensors: dict[str, Tensor] = {name: stored.get_tensor(f"{shape.name}:{name}") for name in names}
                for name in lacking:
                    like = tensors["together_EE" if name.endswith("_EE") else "tokens"]
                    tensors[name] = torch.full_like(like, torch.nan)
                layers.append(LayerStats(shape, **tensors))
            return ModelStats(metadata["model_id"], metadata["data_fingerprint"], layers, metadata["dtype"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"--stats {file}: not a statistics file of this program ({error}).") from error
