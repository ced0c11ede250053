"""The published dimensions of the models that people prune, without their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lightning_moe.moe.checkpoints import new_model
from lightning_moe.moe.deepseek_v1 import converted_config, is_deepseek_v1
from lightning_moe.moe.weight_shards import SHARD_BYTES

CONFIGS = Path(__file__).parents[1] / "data" / "configs"

PARAMETERS = {
    "deepseek_moe_16b": 16_375_783_424,  # with a gate of the shared experts in each layer, which v1 does without
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "qwen2_57b_a14b": 57_408_658_944,
}


def real_config(name: str) -> Any:
    """As the commands see it: DeepSeek's own format converted."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    if is_deepseek_v1(raw):
        return converted_config(raw, torch.bfloat16, CONFIGS)
    return AutoConfig.for_model(**raw)


def real_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return new_model(real_config(name), torch.bfloat16)


def sparse_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of the real size whose weights are holes in its files: names, shapes and places are real."""
    model = real_model(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    shards: list[tuple[dict[str, Any], int]] = []
    for tensor_name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if not shards or shards[-1][1] > SHARD_BYTES:
            shards.append(({}, 0))
        header, start = shards[-1]
        end = start + tensor.numel() * 2
        header[tensor_name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        shards[-1] = header, end
    weight_map = {}
    for number, (header, end) in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(header, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
