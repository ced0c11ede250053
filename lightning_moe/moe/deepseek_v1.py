"""DeepSeek-MoE-16B's own checkpoint format (``model_type: deepseek``) rewritten as a stock ``qwen2_moe`` one.

Transformers has no class for it, but the function it computes is one that ``qwen2_moe`` computes too:

* both take a softmax over all routed experts and then the top k, with or without renormalisation;
* the ``first_k_dense_replace`` dense layers are ``mlp_only_layers``, and ``qkv_bias`` can be switched off;
* the ungated shared experts are stored fused: one shared expert, whose gate would have to say 1. A gate of
  zeros says sigmoid(0) = 1/2, so ``down_proj`` is doubled; both steps are exact in floating point.

In float32 the logits agree up to the order of summation. In 16 bits the router also rounds differently: its
softmax is float32 here. The training-only auxiliary loss keeps its coefficient, not v1's formula.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2MoeConfig

from lightning_moe.errors import InputError, first_line

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
          "num_attention_heads", "n_routed_experts", "num_experts_per_tok")  # fmt: skip
_OPTIONAL_SIZES = ("num_key_value_heads", "n_shared_experts", "first_k_dense_replace")
# What v1's own config class fills in where config.json is silent; qwen2_moe's defaults are others.
_DEFAULTS = {"hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02,
             "rms_norm_eps": 1e-6, "use_cache": True, "tie_word_embeddings": False, "attention_dropout": 0.0,
             "pad_token_id": None, "bos_token_id": 100000, "eos_token_id": 100001}  # fmt: skip
_ONLY = {"scoring_func": "softmax", "moe_layer_freq": 1, "attention_bias": False, "routed_scaling_factor": 1,
         "quantization_config": None}  # fmt: skip
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DOUBLED = re.compile(r"\.shared_experts?\.down_proj\.")
# Data that travels along; code never does.
_TOKENIZER_FILE = r"(tokenizer|special_|added_|vocab|merges|chat_|generation_).*\.(json|txt|model|jinja)"


def is_deepseek_v1(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` describes DeepSeek-MoE v1 (its successors are ``deepseek_v2`` and so on)."""
    return config.get("model_type") == "deepseek"


def convert_deepseek_v1(source: Path, target: Path, *, max_shard_bytes: int = 4_000_000_000) -> None:
    """Write the v1 checkpoint in ``source`` as a ``qwen2_moe`` checkpoint to ``target``.

    At most ``max_shard_bytes`` (or one tensor) are held in memory. ``target`` appears only when complete;
    what cannot be mapped without loss raises ``InputError`` before anything is written.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists and is not an empty folder: choose another target")
    # Missing parents are made at the very end, so that a failure leaves none behind.
    anchor = next(parent for parent in target.parents if parent.exists())
    if not anchor.is_dir():
        raise InputError(f"{anchor} is not a folder: choose another target")
    config = _read_json(source / "config.json")
    _check_config(config, source)
    stored = _stored_tensors(source)
    if config.get("tie_word_embeddings"):  # v1 ties on loading, whatever the file holds
        stored.pop("lm_head.weight", None)
    expected, added = _shapes(config)
    _check_tensors(stored, expected, source)
    new_config = converted_config(config, dtype := stored["model.embed_tokens.weight"].dtype, source)
    tensors = {name.replace(".shared_experts.", ".shared_expert."): stored.pop(name) for name in list(stored)}
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in added.items()}

    staging = anchor / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        staging.mkdir()
        _write_tensors(tensors, staging, max_shard_bytes)
        new_config.to_json_file(staging / "config.json")
        _copy_tokenizer(source, staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _check_config(config: dict[str, Any], source: Path) -> None:
    if not is_deepseek_v1(config):
        raise InputError(f"{source}: model_type is {config.get('model_type')!r}, and it must be 'deepseek'")
    for key, only in _ONLY.items():
        if (value := config.get(key)) is not None and value != only:
            raise InputError(f"{source}: {key} is {value!r}, and only {only!r} maps onto qwen2_moe")
    for key in (*_SIZES, *filter(config.get, _OPTIONAL_SIZES)):
        if type(value := config.get(key)) is not int or value <= 0:
            raise InputError(f"{source}: {key} is {value!r}, and a positive integer is needed")


def converted_config(config: dict[str, Any], dtype: torch.dtype, source: Path) -> Qwen2MoeConfig:
    """The config of the ``qwen2_moe`` model that computes what a v1 ``config.json`` describes; ``source`` is named in
    what it refuses (``InputError``).
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default", **scaling}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    # v1 knows these, and transformers' formulas for them are v1's.
    if rope["rope_type"] not in ("default", "linear", "dynamic"):
        raise InputError(f"{source}: rope_scaling is {scaling!r}, and only linear and dynamic scaling map")
    try:
        return Qwen2MoeConfig(
            **{key: config[key] for key in _SIZES if key != "n_routed_experts"},
            **{key: config.get(key, default) for key, default in _DEFAULTS.items()},
            num_experts=config["n_routed_experts"],
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            shared_expert_intermediate_size=_shared_width(config),
            mlp_only_layers=list(range(config.get("first_k_dense_replace") or 0)),
            # With k = 1 v1 ignores the flag, where qwen2_moe would set every weight to 1.
            norm_topk_prob=bool(config.get("norm_topk_prob")) and config["num_experts_per_tok"] > 1,
            router_aux_loss_coef=config.get("aux_loss_alpha", 0.001),
            rope_parameters=rope,
            qkv_bias=False,
            architectures=["Qwen2MoeForCausalLM"],
            dtype=dtype,
        )
    except (StrictDataclassError, KeyError) as error:  # such as rope scaling without its factor
        raise InputError(f"{source}: not a valid qwen2_moe config: {' '.join(str(error).split())}") from error


def _shared_width(config: dict[str, Any]) -> int:
    # qwen2_moe always has a shared expert: where v1 has none, it is one unit of zeros, which adds exactly 0.
    return int(config["moe_intermediate_size"]) * int(config.get("n_shared_experts") or 0) or 1


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}


def _shapes(config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Every tensor of a v1 checkpoint, and the zeros that qwen2_moe has on top, each with its shape."""
    vocabulary, hidden, heads = config["vocab_size"], config["hidden_size"], config["num_attention_heads"]
    queries = heads * (hidden // heads)
    values = (config.get("num_key_value_heads") or heads) * (hidden // heads)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    added: dict[str, tuple[int, ...]] = {}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for name, rows in (("q", queries), ("k", values), ("v", values)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, queries)
        if layer < (config.get("first_k_dense_replace") or 0):
            shapes |= _mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        for expert in range(config["n_routed_experts"]):
            shapes |= _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        added[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, hidden)
        if config.get("n_shared_experts"):
            shapes |= _mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, _shared_width(config))
        else:
            added |= _mlp_shapes(f"{prefix}.mlp.shared_expert", hidden, _shared_width(config))
    return shapes, added


def _check_tensors(stored: dict[str, Tensor], expected: dict[str, tuple[int, ...]], source: Path) -> None:
    for word, names in (("lacks", expected.keys() - stored), ("has unexpected", stored.keys() - expected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{source}: the checkpoint {word} tensors ({len(names)}): {listed}")
    for name, tensor in stored.items():
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if shape != expected[name]:
            raise InputError(f"{source}: {name} is {shape}, and config.json says {expected[name]}")
        if dtype not in _DTYPES:
            raise InputError(f"{source}: {name} is {dtype}: only unquantised weights can be converted")
        # Doubling is exact unless it overflows, and only float16 has weights in reach of that.
        if _DOUBLED.search(name) and dtype == torch.float16 and (tensor * 2).isinf().any():
            raise InputError(f"{source}: {name} overflows float16 when doubled: cast it to bfloat16 first")


def _stored_tensors(source: Path) -> dict[str, Tensor]:
    """All tensors, mapped from their files: nothing is read before it is used."""
    for single in _WEIGHTS:
        index = source / f"{single}.index.json"
        if not index.is_file() and not (source / single).is_file():
            continue
        shards = _read_json(index).get("weight_map", {}).values() if index.is_file() else [single]
        stored: dict[str, Tensor] = {}
        for shard in (source / name for name in sorted(set(shards))):
            try:
                safe = shard.suffix == ".safetensors"
                stored |= load_file(shard) if safe else torch.load(shard, "cpu", weights_only=True, mmap=True)
            except Exception as error:  # each reader has its own set of them, torch's with many lines
                raise InputError(f"cannot read {shard}: {first_line(error)}") from error
        # Rotary frequencies follow from the config; old versions saved them all the same.
        return {name: stored[name] for name in stored if not name.endswith(".rotary_emb.inv_freq")}
    raise InputError(f"{source} holds no weights: neither {' nor '.join(_WEIGHTS)}, nor an index of either")


def _write_tensors(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_bytes)
    for file_name, names in split.filename_to_tensors.items():
        # Taken out of ``tensors``, so that the last one of a source file lets go of it.
        held = {key: tensors.pop(key).detach().clone(memory_format=torch.contiguous_format) for key in names}
        for name in filter(_DOUBLED.search, names):
            held[name] *= 2
        save_file(held, folder / file_name, metadata={"format": "pt"})
        del held  # before the next shard is read, or there would be two
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{_WEIGHTS[0]}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if re.fullmatch(_TOKENIZER_FILE, path.name) and path.is_file():
            shutil.copyfile(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    config = _read_json(path) if path.exists() else {}
    config.pop("auto_map", None)
    if (folder / "tokenizer.json").exists():
        # Without a class AutoTokenizer would follow the model type, and Qwen's splits text its own way.
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if config:
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """``python -m lightning_moe.moe.deepseek_v1 SOURCE TARGET``."""
    parser = argparse.ArgumentParser(description="Rewrite a DeepSeek-MoE v1 checkpoint as a qwen2_moe one.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the DeepSeek-MoE checkpoint")
    parser.add_argument("target", type=Path, metavar="TARGET", help="new or empty folder for the result")
    try:
        convert_deepseek_v1(**vars(parser.parse_args(arguments)))
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
