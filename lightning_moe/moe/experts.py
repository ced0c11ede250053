"""The experts function: every expert of a layer on its tokens, observed and gated on the way.

Registered with transformers under ``lightning_moe``, it serves every architecture that hands its router's choice
to its experts; no modelling file is touched.
"""

# T tokens, K experts per token, N = T * K assignments sorted by expert, E experts, H model width, F expert width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.non_uniform import stacked_parameters

IMPLEMENTATION = "lightning_moe"


@dataclass(frozen=True)
class Assignments:
    """What the experts of one layer computed in one forward: a row per (token, expert), sorted by expert."""

    outputs_NH: Tensor
    """Expert outputs before the routing weight."""
    token_N: Tensor
    weight_N: Tensor
    """Routing weights as given by the router, gates left out."""
    count_E: Tensor


@dataclass
class ExpertHooks:
    """What to do inside one layer's experts function."""

    observe: Callable[[Assignments], None] | None = None
    gates_E: Tensor | None = None
    """A factor on each expert's routing weight; gradients reach it."""


def experts_forward(experts: nn.Module, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, ``(T, H)``: the same as the stock grouped path."""
    hooks: ExpertHooks | None = getattr(experts, "lightning_moe_hooks", None)
    given_TK = weights_TK
    if hooks is not None and hooks.gates_E is not None:
        weights_TK = weights_TK * hooks.gates_E[expert_ids_TK].to(weights_TK.dtype)
    top_k, num_experts = expert_ids_TK.shape[-1], stacked_parameters(experts)["down_proj"].shape[0]
    expert_N, order_N = expert_ids_TK.flatten().sort(stable=True)
    token_N = order_N // top_k
    count_E = torch.bincount(expert_N, minlength=num_experts)
    outputs_NH = _expert_outputs(experts, hidden_TH.index_select(0, token_N), expert_N, count_E)
    if hooks is not None and hooks.observe is not None:
        hooks.observe(Assignments(outputs_NH, token_N, given_TK.flatten()[order_N], count_E))
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    outputs_TKH = outputs_NH.index_select(0, position_N).view(*expert_ids_TK.shape, -1)
    weights_TK = weights_TK.to(outputs_TKH.dtype)
    return (weights_TK.unsqueeze(1) @ outputs_TKH).squeeze(1).to(hidden_TH.dtype)


def _expert_outputs(experts: nn.Module, inputs_NH: Tensor, expert_N: Tensor, count_E: Tensor) -> Tensor:
    """Outputs of sorted assignments, ``(N, H)``; the flags are those transformers' own decorator sets."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_NF = _grouped_linear(experts, name, inputs_NH, expert_N, count_E)
    inner_NF = experts._apply_gate(inner_NF) if experts.has_gate else experts.act_fn(inner_NF)  # type: ignore[operator]
    outputs_NH = _grouped_linear(experts, "down_proj", inner_NF, expert_N, count_E)
    return experts.post_expert_norm(outputs_NH) if experts.has_post_expert_norm else outputs_NH  # type: ignore[operator]


def _grouped_linear(experts: nn.Module, name: str, inputs: Tensor, expert_N: Tensor, count_E: Tensor) -> Tensor:
    weight: Tensor = getattr(experts, name)
    if not experts.is_transposed:
        weight = weight.transpose(-2, -1)
    inputs = inputs.to(weight.dtype)
    if _grouped_mm_takes(inputs, weight):
        ends_E = count_E.cumsum(0, dtype=torch.int32)
        outputs = functional.grouped_mm(inputs, weight, offs=ends_E)
    else:
        groups = zip(torch.split(inputs, count_E.tolist()), weight, strict=True)
        outputs = torch.cat([rows @ matrix for rows, matrix in groups])
    return outputs + getattr(experts, f"{name}_bias")[expert_N] if experts.has_bias else outputs


def _grouped_mm_takes(inputs: Tensor, weight: Tensor) -> bool:
    """``grouped_mm`` knows no float64 and wants rows of a multiple of 16 bytes; CUDA needs compute 8.0."""
    if inputs.dtype == torch.float64:
        return False
    if any(size * inputs.element_size() % 16 for size in weight.shape[1:]):
        return False
    return inputs.device.type != "cuda" or torch.cuda.get_device_capability(inputs.device) >= (8, 0)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


@contextmanager
def expert_hooks(model: PreTrainedModel, layers: list[MoELayer], hooks: Mapping[str, ExpertHooks]) -> Iterator[None]:
    """Run ``model`` through ``experts_forward`` with ``hooks`` (by layer name) inside the context.

    Contexts nest: what an inner one does not set, an outer one's hooks still do.
    """
    implementation = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    outer: dict[str, ExpertHooks] = {}
    for layer in layers:
        outer[layer.name] = vars(layer.experts).get("lightning_moe_hooks", ExpertHooks())
        inner = hooks.get(layer.name, ExpertHooks())
        vars(layer.experts)["lightning_moe_hooks"] = ExpertHooks(
            inner.observe or outer[layer.name].observe,
            outer[layer.name].gates_E if inner.gates_E is None else inner.gates_E,
        )
    try:
        yield
    finally:
        for layer in layers:
            vars(layer.experts)["lightning_moe_hooks"] = outer[layer.name]
            if outer[layer.name] == ExpertHooks():
                del vars(layer.experts)["lightning_moe_hooks"]
        model.set_experts_implementation(implementation)
