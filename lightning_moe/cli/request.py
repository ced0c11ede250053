"""What a command was asked, in plain values: two runs with equal ones are the same work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import model_id, resolve, skeleton, weight_files


def model_path(model: MoECausalLM) -> str:
    """``--model.path``, which every command but ``fit`` needs."""
    if model.path is None:
        raise InputError("no model: give --model.path a folder or hub id.")
    return model.path


def seed() -> int:
    """What ``--seed_everything`` set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def weights_type(trainer: Trainer, model: MoECausalLM) -> str:
    """In what precision the model runs: how its weights are loaded, and what the Trainer makes of them."""
    quantize = getattr(trainer.strategy, "quantize", None)
    return ", ".join(map(str, filter(None, (model.dtype_name, trainer.precision, quantize))))


def asked_model(trainer: Trainer, model: MoECausalLM) -> dict[str, Any]:
    path = model_path(model)
    return {"model.path": _spelled(path), "model_id": model_id(path), "precision": weights_type(trainer, model)}


def asked_data(data: TextDataModule) -> dict[str, Any]:
    """The text and how it is sampled; not the batch size, which changes no result."""
    if data.path is None:
        raise InputError("no text: give --data.path a file, a folder or the name of a dataset.")
    names = ("subset", "split", "seq_len", "samples")
    places = {f"data.{name}": _spelled(str(getattr(data, name))) for name in ("path", "tokenizer")}
    return places | {f"data.{name}": getattr(data, name) for name in names} | {"data.content": data.content_fingerprint}


def asked_validation(validation: TextDataModule) -> dict[str, Any]:
    """The text that results are measured on."""
    measured = asked_data(validation)
    return {f"data.val_{name}": measured[f"data.{name}"] for name in ("path", "samples", "content")}


def asked_batches(trainer: Trainer, data: TextDataModule) -> dict[str, int]:
    """How many windows make an update: what changes the result of a search, and of nothing else."""
    return {"data.batch_size": data.batch_size, "world_size": trainer.world_size}


def refuse_less_text(trainer: Trainer, option: str) -> None:
    """Raise ``InputError`` when a Trainer option would leave out text that the results speak of."""
    limit = getattr(trainer, option)
    if isinstance(limit, int) or limit != 1.0:  # the integer 1 means one batch, 1.0 all of them
        raise InputError(f"--trainer.{option} {limit}: to take less text, give --data.samples instead.")


def _spelled(path: str) -> str:
    """One spelling for each place on disk; names on a hub stay as they are."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def checkpoint_size(path: str) -> dict[str, int]:
    """Parameters, and bytes of the weight files."""
    return {
        "parameters": sum(parameter.numel() for parameter in skeleton(path).parameters()),
        "bytes": sum(file.stat().st_size for file in weight_files(resolve(path))),
    }
