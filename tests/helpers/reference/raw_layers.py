"""What happened at a layer, token by token: each expert run by itself on each of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.reference.stock_experts import expert_matrices, router_rows, run_alone, watch, zeros_like
from tests.helpers.reference.vectors import Vector, cosine, dot, softmax


@dataclass(frozen=True)
class Visit:
    """One token at one of its experts."""

    expert: int
    weight: float
    """As the router gave it."""
    output: Vector
    """Of the expert, before the weight."""


@dataclass(frozen=True)
class SeenToken:
    """One token at one MoE layer."""

    token_id: int
    probabilities: Vector
    """Softmax of the router's logits, over all experts."""
    visits: list[Visit]
    sequence: int = 0
    logits: Sequence[float] = ()
    """The router's logits where they are known; else those that its probabilities have, up to a shift."""


@dataclass(frozen=True)
class RawLayer:
    """All that happened at one MoE layer, and its weights taken apart."""

    num_experts: int
    vocab_size: int
    tokens: list[SeenToken]
    router_rows: list[Vector] = field(default_factory=list)
    matrices: list[list[Tensor]] = field(default_factory=list)
    """Per expert, its matrices."""
    gradients: list[list[Tensor]] = field(default_factory=list)
    """Per expert, the summed gradients of its matrices, a row for each hidden neuron."""
    cosines: tuple[float, float] = (0.0, 0.0)
    """Of the residual stream before and after the MoE block, and the whole decoder layer, summed over tokens."""

    def outputs(self, expert: int) -> list[Vector]:
        return [visit.output for token in self.tokens for visit in token.visits if visit.expert == expert]

    def token_ids(self, expert: int) -> set[int]:
        return {token.token_id for token in self.tokens if expert in self.chosen(token)}

    @staticmethod
    def chosen(token: SeenToken) -> list[int]:
        return [visit.expert for visit in token.visits]


def raw_layers(
    model: PreTrainedModel,
    parts: Sequence[tuple[nn.Module, nn.Module]],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> list[RawLayer]:
    """Observe a model by running each expert by itself on each of its tokens. Padding is left out."""
    counted = [True] * input_ids.numel() if attention_mask is None else attention_mask.flatten().bool().tolist()
    token_ids = input_ids.flatten().tolist()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    layers = []
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    cosines = [residual_cosines(model, experts, inputs, counted) for _, experts in parts]
    for turn, ((router, experts), call) in enumerate(zip(parts, watch(model, parts, **inputs), strict=True)):
        rows, bias = router_rows(router)
        tokens = []
        for position, token_id in enumerate(token_ids):
            if not counted[position]:
                continue
            x = call.router_input_TH[position].double().tolist()
            logits = [dot(row, x) + b for row, b in zip(rows, bias, strict=True)]
            with torch.no_grad():
                visits = [
                    Visit(expert, weight, run_alone(experts, expert, call.hidden_TH[position][None])[0].tolist())
                    for expert, weight in zip(
                        call.ids_TK[position].tolist(), call.weights_TK[position].tolist(), strict=True
                    )
                ]
            tokens.append(SeenToken(token_id, softmax(logits), visits, position // input_ids.shape[-1], logits))
        matrices = [expert_matrices(experts, expert) for expert in range(len(rows))]
        layers.append(RawLayer(len(rows), vocab_size, tokens, rows, matrices, cosines=cosines[turn]))
    return layers


def residual_cosines(
    model: PreTrainedModel, experts: nn.Module, inputs: Mapping[str, Any], counted: Sequence[bool]
) -> tuple[float, float]:
    """Between the decoder layer's output without and with its MoE block, and between its input and its output.

    Without the block the residual stream is left as it was before; MiniMax alone scales it, after a norm.
    """
    lists = (layer for one in model.modules() if isinstance(one, nn.ModuleList) for layer in one)
    decoder = next(layer for layer in lists if any(part is experts for part in layer.modules()))
    block = next(part for part in decoder.modules() if any(child is experts for child in part.children()))
    seen: dict[str, Tensor] = {}

    def run(name: str, hooks: Sequence[Any]) -> None:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            seen["in"] = args[0]

        handles = [decoder.register_forward_hook(note), *hooks]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()

    run("without", [block.register_forward_hook(lambda module, args, output: zeros_like(output))])
    norm_hook = getattr(decoder, "post_attention_layernorm", block).register_forward_pre_hook(
        lambda module, args: seen.update({"norm": args[0]})
    )
    run("out", [norm_hook])
    before = seen["norm" if "MiniMax" in type(decoder).__name__ else "without"]
    rows = [
        tensor.flatten(0, -2).double()[torch.tensor(counted)].tolist() for tensor in (before, seen["in"], seen["out"])
    ]
    return (
        math.fsum(cosine(one, after) for one, after in zip(rows[0], rows[2], strict=True)),
        math.fsum(cosine(one, after) for one, after in zip(rows[1], rows[2], strict=True)),
    )
