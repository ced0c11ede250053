"""Routers, experts and blocks of stock models: one token, one expert, one neuron at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.reference.vectors import Vector


def run_alone(experts: nn.Module, expert: int, inputs_RH: Tensor) -> Tensor:
    """The outputs of one expert, ``(R, H)``, by the loop in the architecture's own modelling file."""
    ids = torch.full((inputs_RH.shape[0], 1), expert)
    weights = torch.ones(inputs_RH.shape[0], 1, dtype=inputs_RH.dtype)
    return type(experts).forward.__wrapped__(experts, inputs_RH, ids, weights)  # type: ignore[attr-defined]


def weighted_sum(
    experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gates_E: Tensor | None = None
) -> Tensor:
    """What the experts of a layer give back, token by token: ``sum_k weight * gate * f(x)``."""
    rows = []
    for hidden_H, ids, weights in zip(hidden_TH, ids_TK.tolist(), weights_TK, strict=True):
        row = torch.zeros_like(hidden_H)
        for expert, weight in zip(ids, weights, strict=True):
            gate = 1.0 if gates_E is None else gates_E[expert]
            row = row + weight * gate * run_alone(experts, expert, hidden_H[None])[0]
        rows.append(row)
    return torch.stack(rows)


@dataclass(frozen=True)
class Call:
    """What one experts module was given in one forward."""

    router_input_TH: Tensor
    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def watch(model: PreTrainedModel, parts: Sequence[tuple[nn.Module, nn.Module]], **inputs: Any) -> list[Call]:
    """Run the stock model and note what each (router, experts) was given."""
    router_inputs: dict[int, Tensor] = {}
    given: dict[int, tuple[Tensor, ...]] = {}
    handles = []
    for number, (router, experts) in enumerate(parts):
        handles.append(
            router.register_forward_pre_hook(lambda _, args, number=number: router_inputs.update({number: args[0]}))
        )
        handles.append(experts.register_forward_pre_hook(lambda _, args, number=number: given.update({number: args})))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    calls = []
    for number in range(len(parts)):
        hidden, ids, weights = given[number]
        flat = hidden.reshape(-1, hidden.shape[-1])
        router_input = router_inputs[number]
        calls.append(
            Call(
                router_input.reshape(-1, router_input.shape[-1]),
                flat,
                ids.reshape(flat.shape[0], -1),
                weights.reshape(flat.shape[0], -1),
            )
        )
    return calls


def router_rows(router: nn.Module) -> tuple[list[Vector], Vector]:
    """The router's matrix, a row per expert, and its bias (zeros where there is none)."""
    matrix = next(p for p in router.parameters() if p.dim() == 2)
    biases = [p for name, p in router.named_parameters() if p.dim() == 1 and name.rpartition(".")[2] == "bias"]
    bias = biases[0].tolist() if biases else [0.0] * matrix.shape[0]
    return matrix.double().tolist(), bias


def expert_matrices(experts: nn.Module, expert: int, gradients: bool = False) -> list[Tensor]:
    """Gate, up and down of one expert, or their gradients. GPT-OSS stores gate and up as every other column, all
    others one after the other as rows."""
    stacks = experts.gate_up_proj, experts.down_proj
    fused, down = ((stack.grad if gradients else stack.detach())[expert] for stack in stacks)
    if "GptOss" in type(experts).__name__:
        return [fused[:, 0::2], fused[:, 1::2], down]
    half = fused.shape[0] // 2
    return [fused[:half], fused[half:], down]


def inner_activations(experts: nn.Module, expert: int, inputs_RH: Tensor) -> Tensor:
    """What one expert's down matrix is given, ``(R, F)``: its formula written out, in the type of the inputs."""
    gate, up, _ = (matrix.to(inputs_RH.dtype) for matrix in expert_matrices(experts, expert))
    if "GptOss" not in type(experts).__name__:
        return nn.functional.silu(nn.functional.linear(inputs_RH, gate)) * nn.functional.linear(inputs_RH, up)
    bias = experts.gate_up_proj_bias[expert].detach().to(inputs_RH.dtype)  # type: ignore[index, union-attr]
    gated = (inputs_RH @ gate + bias[0::2]).clamp(max=7.0)
    linear = (inputs_RH @ up + bias[1::2]).clamp(-7.0, 7.0)
    return gated * torch.sigmoid(1.702 * gated) * (linear + 1)


def permuted_neurons(experts: nn.Module, expert: int, order: Sequence[int]) -> None:
    """Put the neurons of one expert in another order, neuron by neuron: the same function of its input."""
    width, before = len(order), {name: stack.detach().clone() for name, stack in experts.named_parameters()}
    for name, stack in experts.named_parameters():
        new, old = stack.data[expert], before[name][expert]
        if name.endswith("bias"):  # a vector is a matrix of one column
            new, old = new[:, None], old[:, None]
        elif experts.is_transposed != name.startswith("down"):
            new, old = new.T, old.T
        if name == "down_proj_bias":
            continue
        for place, neuron in enumerate(order):
            if not name.startswith("gate_up"):
                new[place] = old[neuron]
            elif experts.is_concatenated:
                new[place], new[width + place] = old[neuron], old[width + neuron]
            else:
                new[2 * place], new[2 * place + 1] = old[2 * neuron], old[2 * neuron + 1]


def zeros_like(output: Any) -> Any:
    """What an MoE block gives that adds nothing, in the form of its output."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
