"""Loading and saving models: folders or hub ids in, Hugging Face folders out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_moe.errors import UNREADABLE, InputError, first_line
from lightning_moe.files import looks_local, replaced_folder
from lightning_moe.moe.expert_counts import layers_gone, set_counts
from lightning_moe.moe.layers import LayerShape, check_unpacked, find_moe_layers
from lightning_moe.moe.non_uniform import resize_moe_layers
from lightning_moe.moe.remote_code import add_modelling_file
from lightning_moe.moe.skip_tables import refresh_skipping, stored_entry

WHOLE_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 12
"""To tell two checkpoints apart: tensors up to the first size are read whole, larger ones at three places."""


def register_non_uniform() -> None:
    """Let stock classes load our checkpoints in this process; done when lightning_moe is imported.

    Every model of transformers ends its construction with ``post_init``; there, before weights are loaded, layers
    take the count that the config names, and skip experts if it says so. Models whose config says neither are not
    touched.
    """
    stock: Callable[[PreTrainedModel], None] = PreTrainedModel.post_init
    if hasattr(stock, "resizes_moe_layers"):
        return

    @wraps(stock)
    def post_init(self: PreTrainedModel) -> None:
        resize_moe_layers(self)
        if stored_entry(self.config) is not None:
            refresh_skipping(self)
        stock(self)

    post_init.resizes_moe_layers = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def resolve(path: str) -> Path:
    """The local folder of a model: ``path`` itself, or the snapshot of a hub id. Raises ``InputError``."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            near = f" Did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
            raise InputError(f"--model.path {path}: no config.json in it, so this is no model folder.{near}")
        return folder
    if folder.exists():
        raise InputError(f"--model.path {path}: a file; give the folder that holds config.json.")
    if looks_local(path):
        raise InputError(f"--model.path {path}: no such folder.")
    try:
        return Path(snapshot_download(path, ignore_patterns=["*.pth", "*.gguf", "original/*", "consolidated*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"--model.path {path}: no such folder, and no model of that name on the hub ({reason})"
        ) from error


def read_config(path: str) -> Any:
    """The model's config; explains what cannot be read."""
    folder = resolve(path)
    try:
        raw = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'config.json'}: not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise InputError(f"{folder / 'config.json'}: a {type(raw).__name__}, where a config is an object.")
    if raw.get("model_type") == "deepseek":
        raise InputError(
            f"--model.path {path}: a DeepSeek-MoE v1 checkpoint; convert it first, without loss: "
            f"python -m lightning_moe.moe.deepseek_v1 {path} TARGET"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model.path {path}: {first_line(error)}") from error


def skeleton(path: str) -> PreTrainedModel:
    """The model without its weights (meta device): its structure, at no cost whatever its size."""
    config = read_config(path)
    try:
        with torch.device("meta"):
            return new_model(config)
    except ValueError as error:
        raise InputError(f"--model.path {path}: {first_line(error)}") from error


def new_model(config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model with random weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def layer_shapes(path: str) -> list[LayerShape]:
    """The MoE layers of a model on disk. Raises ``InputError`` when it has none."""
    try:
        return [layer.shape for layer in find_moe_layers(skeleton(path))]
    except InputError as error:
        message = str(error)
        raise InputError(
            message if message.startswith("--model.path") else f"--model.path {path}: {message}"
        ) from error


def model_id(path: str) -> str:
    """Name and fingerprint of a checkpoint: its config and every tensor, small ones (routers) as a whole."""
    folder = resolve(path)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            for name, start, end in _tensor_places(file):
                digest.update(f"{name} {end - start}".encode())
                if end - start <= WHOLE_BYTES:
                    places = [(start, end - start)]
                else:
                    places = [(place, SAMPLE_BYTES) for place in (start, (start + end) // 2, end - SAMPLE_BYTES)]
                for place, size in places:
                    stream.seek(place)
                    digest.update(stream.read(size))
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def same_model(one: str, other: str) -> bool:
    """Whether two ids name the same checkpoint, whatever its folder is called now."""
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def _tensor_places(file: Path) -> list[tuple[str, int, int]]:
    """Name, first and last byte of each tensor in a safetensors file; an old file is one piece."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return [(file.name, start, min(start + WHOLE_BYTES, size)) for start in range(0, size, WHOLE_BYTES)]
    with file.open("rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        if not 0 < head <= size - 8:
            raise InputError(f"--model.path {file.parent}: {file.name} is not a whole safetensors file.")
        try:
            header = json.loads(stream.read(head))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"--model.path {file.parent}: {file.name} is not a whole safetensors file.") from error
    header.pop("__metadata__", None)
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    return [(name, 8 + head + start, 8 + head + end) for name, (start, end) in sorted(places.items())]


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers reads from a folder: an index names them, or there is just one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (*UNREADABLE, TypeError, AttributeError) as error:
                raise InputError(f"--model.path {folder}: {index.name} is no whole index of weights.") from error
            for file in files:
                if not file.is_file():
                    raise InputError(f"--model.path {folder}: {file.name} is missing; the checkpoint is incomplete.")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise InputError(f"--model.path {folder}: no weights in it (model.safetensors or its index).")


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds no NaN and no infinity.

    One NaN or infinity makes the sum so, and a sum is five times faster; a sum that overflows is looked at again.
    """
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model and see that its weights are all there and finite. Raises ``InputError``."""
    config = read_config(path)
    weight_files(resolve(path))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
    except (*UNREADABLE, SafetensorError) as error:
        raise InputError(f"--model.path {path}: it cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise InputError(f"--model.path {path}: {len(missing)} weights are missing, the first is {missing[0]}.")
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise InputError(
                f"--model.path {path}: {name} holds values that are not finite; the checkpoint is damaged."
            )
    return model


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or raise ``InputError`` with the reason and the remedy."""
    if path is None:
        raise InputError("no tokenizer: give --data.tokenizer a folder or hub id.")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: no tokenizer found there; give --data.tokenizer the folder or hub id of one."
        ) from error


def save_model(model: PreTrainedModel, target: Path, tokenizer: str | None = None, dtype: str | None = None) -> None:
    """Write ``model`` (and the tokenizer found at ``tokenizer``) to ``target``, beside it first, then renamed.

    Uniform models become stock checkpoints. Non-uniform ones carry transformers' ``per_layer_config`` and the code
    that ``trust_remote_code=True`` needs. Another ``dtype`` leaves in float32 what transformers keeps so.
    """
    check_unpacked(model, "saved")
    with replaced_folder(target) as folder:
        if dtype is not None:
            write_model(model, folder)
            model = type(model).from_pretrained(folder, dtype=getattr(torch, dtype))
            for file in folder.iterdir():
                file.unlink()
        write_model(model, folder)
        if tokenizer is not None:
            load_tokenizer(tokenizer).save_pretrained(folder)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write weights, configs and, where it is needed, the modelling file into an existing folder."""
    if layers_gone(model.config):  # older versions said it so that stock transformers would load it
        set_counts(model.config, {layer.parts.index: layer.num_experts for layer in find_moe_layers(model)})
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    add_modelling_file(config, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
