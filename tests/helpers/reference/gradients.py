"""Summed weight gradients of experts, position by position, and the criteria on them (MC-Suite 2504.05586)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.reference.raw_layers import RawLayer
from tests.helpers.reference.statistics import outliers
from tests.helpers.reference.stock_experts import expert_matrices
from tests.helpers.reference.vectors import Vector, norm, standard_deviation


def neuron_gradients(experts: nn.Module, expert: int) -> list[Tensor]:
    """The gradients of gate, up and down of one expert, a row for each hidden neuron. GPT-OSS has neurons in the
    columns of gate and up and the rows of down, all others the other way."""
    gate, up, down = expert_matrices(experts, expert, gradients=True)
    return [gate.T, up.T, down] if "GptOss" in type(experts).__name__ else [gate, up, down.T]


def raw_gradients(model: PreTrainedModel, experts: Sequence[nn.Module], windows: Sequence[Tensor]) -> list[RawLayer]:
    """The stock model, one window after another, and each position's loss by itself, summed up in float64."""
    model.set_experts_implementation("eager")
    sums = [[[0.0] * 3 for _ in module.down_proj] for module in experts]  # type: ignore[union-attr]
    for window in windows:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        losses = [
            -logits[position].float().log_softmax(-1)[window[position + 1]] for position in range(len(window) - 1)
        ]
        torch.stack(losses).sum().backward()
        for layer, module in zip(sums, experts, strict=True):
            for expert, matrices in enumerate(layer):
                for turn, gradient in enumerate(neuron_gradients(module, expert)):
                    matrices[turn] = matrices[turn] + gradient.double()  # type: ignore[call-overload]
    model.zero_grad()
    return [RawLayer(len(layer), 0, [], gradients=layer) for layer in sums]  # type: ignore[arg-type]


def gradient_stats(raw: RawLayer) -> dict[str, Any]:
    flat = [torch.cat([matrix.double().flatten() for matrix in matrices]) for matrices in raw.gradients]
    return {
        "gradient_cosine_EE": [
            [float(f @ g / (f.norm() * g.norm())) if f.any() and g.any() else 0.0 for g in flat] for f in flat
        ],
        "gradient_log_std_E": ege(raw),
        "gradient_outliers_E": ego(raw),
        "gradient_norm_E": egn(raw),
    }


def egs(raw: RawLayer) -> Vector:
    cosines = gradient_stats(raw)["gradient_cosine_EE"]
    return [math.fsum(row) - row[p] for p, row in enumerate(cosines)]


def ege(raw: RawLayer) -> Vector:
    """A std of 0 counts as 1e-30."""
    return [
        math.fsum(
            math.log(max(standard_deviation(column), 1e-30)) for matrix in matrices for column in matrix.T.tolist()
        )
        for matrices in raw.gradients
    ]


def ego(raw: RawLayer) -> Vector:
    return [
        float(sum(outliers(neuron) for matrix in matrices for neuron in matrix.tolist())) for matrices in raw.gradients
    ]


def egn(raw: RawLayer) -> Vector:
    return [
        math.fsum(norm(column) for matrix in matrices for column in matrix.T.tolist()) for matrices in raw.gradients
    ]
