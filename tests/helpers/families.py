"""Tiny random MoE models, one per architecture family: the same laws run over all of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_EXPERTS = 8
TOP_K = 2
HIDDEN = 32
VOCAB = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {"num_local_experts": NUM_EXPERTS}
_PLAIN = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": _PLAIN | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _PLAIN | {"norm_topk_prob": True},
    "olmoe": _PLAIN,
    "deepseek_v2": _DEEPSEEK | {"topk_method": "greedy", "n_group": None, "topk_group": None},
    "deepseek_v3": _DEEPSEEK | {"n_group": 2, "topk_group": 1},
    "gpt_oss": _LOCAL | {"intermediate_size": 32},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "dots1": _DEEPSEEK | {"n_group": 1, "topk_group": 1},
    "granitemoe": _LOCAL,
    "phimoe": _LOCAL,
    "glm4_moe": _DEEPSEEK | {"n_group": 1, "topk_group": 1},
    "minimax": _LOCAL | {"layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "hunyuan_v1_moe": {"num_experts": NUM_EXPERTS, "moe_topk": TOP_K},
    "jamba": {
        "num_experts": NUM_EXPERTS,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 4,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "flex_olmo": _PLAIN,
    "qwen3_next": _PLAIN
    | {
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def tiny_config(family: str, **overrides: Any) -> Any:
    return AutoConfig.for_model(family, **(_COMMON | FAMILIES[family] | overrides))


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model whose routers have a preference, so that top-k is not decided by rounding."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not torch.is_floating_point(tensor) or "inv_freq" in name:
                continue
            if "correction_bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif tensor.dim() >= 2 and "norm" not in name:
                scale = 0.5 if any(part in name for part in (".gate.", ".router.", ".wg.")) else 0.08
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model.eval()


def tiny_batch(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
