"""A model's config where its weights need not be: a folder, a file, or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from lightning_moe.errors import InputError, first_line
from lightning_moe.files import looks_local
from lightning_moe.moe import deepseek_v1


def lone_config(path: str) -> Any:
    """The config at ``path``, that of DeepSeek-MoE v1 as ``deepseek_v1`` converts it. Raises ``InputError``.

    Weights are neither looked for nor fetched.
    """
    file = _config_file(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--model.path {path}: {file.name} is not JSON ({first_line(error)}).") from error
    if not isinstance(raw, dict):
        raise InputError(f"--model.path {path}: {file.name} holds a {type(raw).__name__}; a config is an object.")
    if raw.get("quantization_config"):
        raise InputError(f"--model.path {path}: quantised already, whose sizes are not known; give the plain model.")
    if deepseek_v1.is_deepseek_v1(raw):
        dtype = getattr(torch, str(raw.get("torch_dtype") or raw.get("dtype") or "float32"))
        return deepseek_v1.converted_config(raw, dtype, file)
    try:
        return AutoConfig.from_pretrained(str(file))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model.path {path}: {first_line(error)}") from error


def _config_file(path: str) -> Path:
    place = Path(path)
    if place.is_file():
        return place
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise InputError(f"--model.path {path}: no config.json in it, so this is no model folder.")
        return place / "config.json"
    if looks_local(path):
        raise InputError(f"--model.path {path}: no such folder or file.")
    try:
        return Path(hf_hub_download(path, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--model.path {path}: no such folder or file, and no model of that name on the hub ({first_line(error)})"
        ) from error
