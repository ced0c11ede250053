"""DeepSeek-MoE v1 in slow, obvious torch, and tiny random checkpoints in its own format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

TINY: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "model_type": "deepseek",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.01,
    "seq_aux": True,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
}


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under v1's names, large enough that every part of the model moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads
    key_values = (config["num_key_value_heads"] or heads) * head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def scale() -> Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    weights: dict[str, Tensor] = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}

    def add_mlp(prefix: str, width: int) -> None:
        weights[f"{prefix}.gate_proj.weight"] = matrix(width, hidden)
        weights[f"{prefix}.up_proj.weight"] = matrix(width, hidden)
        weights[f"{prefix}.down_proj.weight"] = matrix(hidden, width)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.input_layernorm.weight"] = scale()
        weights[f"{prefix}.post_attention_layernorm.weight"] = scale()
        weights[f"{prefix}.self_attn.q_proj.weight"] = matrix(heads * head_dim, hidden)
        weights[f"{prefix}.self_attn.k_proj.weight"] = matrix(key_values, hidden)
        weights[f"{prefix}.self_attn.v_proj.weight"] = matrix(key_values, hidden)
        weights[f"{prefix}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        if layer < config["first_k_dense_replace"]:
            add_mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        weights[f"{prefix}.mlp.gate.weight"] = matrix(config["n_routed_experts"], hidden)
        for expert in range(config["n_routed_experts"]):
            add_mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            width = config["n_shared_experts"] * config["moe_intermediate_size"]
            add_mlp(f"{prefix}.mlp.shared_experts", width)
    weights["model.norm.weight"] = scale()
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def reference_logits(config: dict[str, Any], weights: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """The logits of every position of every row, computed in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    return torch.stack([_row_logits(config, weights, row) for row in input_ids]).float()


def _row_logits(config: dict[str, Any], weights: dict[str, Tensor], row: Tensor) -> Tensor:
    states = weights["model.embed_tokens.weight"][row]
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = _rms_norm(states, weights[f"{prefix}.input_layernorm.weight"], eps)
        states = states + _attention(config, weights, f"{prefix}.self_attn", normed)
        normed = _rms_norm(states, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            states = states + _mlp(weights, f"{prefix}.mlp", normed)
        else:
            states = states + torch.stack([_moe(config, weights, f"{prefix}.mlp", token) for token in normed])
    states = _rms_norm(states, weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return states @ weights[head].T


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (states / torch.sqrt((states**2).mean(dim=-1, keepdim=True) + eps))


def _mlp(weights: dict[str, Tensor], prefix: str, states: Tensor) -> Tensor:
    gate = states @ weights[f"{prefix}.gate_proj.weight"].T
    up = states @ weights[f"{prefix}.up_proj.weight"].T
    return (silu(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def _moe(config: dict[str, Any], weights: dict[str, Tensor], prefix: str, token: Tensor) -> Tensor:
    scores = torch.softmax(weights[f"{prefix}.gate.weight"] @ token, dim=-1)
    ranked = sorted(range(config["n_routed_experts"]), key=lambda expert: -float(scores[expert]))
    chosen = ranked[: config["num_experts_per_tok"]]
    total = 1.0
    if config["norm_topk_prob"] and len(chosen) > 1:
        total = sum(float(scores[expert]) for expert in chosen)
    output = torch.zeros_like(token)
    for expert in chosen:
        output = output + scores[expert] / total * _mlp(weights, f"{prefix}.experts.{expert}", token)
    # Stored fused, computed one by one: shared expert s owns the s-th block of the intermediate units.
    width = config["moe_intermediate_size"]
    for shared in range(config["n_shared_experts"] or 0):
        units = slice(shared * width, (shared + 1) * width)
        gate = weights[f"{prefix}.shared_experts.gate_proj.weight"][units] @ token
        up = weights[f"{prefix}.shared_experts.up_proj.weight"][units] @ token
        output = output + weights[f"{prefix}.shared_experts.down_proj.weight"][:, units] @ (silu(gate) * up)
    return output


def _attention(config: dict[str, Any], weights: dict[str, Tensor], prefix: str, states: Tensor) -> Tensor:
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    group = heads // (config["num_key_value_heads"] or heads)
    queries = states @ weights[f"{prefix}.q_proj.weight"].T
    keys = states @ weights[f"{prefix}.k_proj.weight"].T
    values = states @ weights[f"{prefix}.v_proj.weight"].T
    outputs = []
    for head in range(heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        shared = slice(head // group * head_dim, (head // group + 1) * head_dim)
        query, key = _rotate(config, queries[:, own]), _rotate(config, keys[:, shared])
        scores = query @ key.T / math.sqrt(head_dim)
        future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        outputs.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ values[:, shared])
    return torch.cat(outputs, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T


def _rotate(config: dict[str, Any], vectors: Tensor) -> Tensor:
    """Rotary embedding: the pair (i, i + half) of position p turns by p * base ** (-2 i / dim)."""
    length, dim = vectors.shape
    base, positions = float(config["rope_theta"]), torch.arange(length).double()
    scaling = config["rope_scaling"]
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling and scaling["type"] == "dynamic" and length > (limit := config["max_position_embeddings"]):
        base *= (scaling["factor"] * length / limit - (scaling["factor"] - 1)) ** (dim / (dim - 2))
    angles = positions[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    first, second = vectors[:, : dim // 2], vectors[:, dim // 2 :]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    shards: int = 1,
    suffix: str = "safetensors",
) -> Path:
    """Write ``config`` and ``weights`` as the hub has them: one file, or some shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file_name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        held = {name: weights[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(held, file_name)
        if suffix == "safetensors":
            save_file(held, folder / file_name, metadata={"format": "pt"})
        else:
            torch.save(held, folder / file_name)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder
