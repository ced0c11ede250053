"""Figures of the weights themselves: norms, likeness, stable rank. No data needed."""

# E experts, O output width, I input width

from __future__ import annotations

import torch
from torch import Tensor

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.ranks import num_ranks, rank, sum_over_ranks

LANCZOS_STEPS = 64
"""Steps of Golub-Kahan bidiagonalisation; enough for the largest singular value to about 1e-6."""


def weight_stats(layer: MoELayer, stable_ranks: bool = True) -> dict[str, Tensor]:
    """The weight figures of ``LayerStats``, one expert in float32 at a time; every rank must call it.

    Raises on non-finite weights.

    Without ``stable_ranks``, by far the dearest of them, these are NaN.
    """
    num_experts = layer.num_experts
    dot_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    rank_E = torch.full((num_experts,), 0.0 if stable_ranks else torch.nan, dtype=torch.float64)
    matrices = layer.expert_matrices
    for stack_EOI in matrices:
        flat = stack_EOI.detach().float().flatten(1)
        finite_E = flat.isfinite().all(1)
        if not bool(finite_E.all()):
            broken = (~finite_E).nonzero().flatten().tolist()
            raise InputError(
                f"{layer.name}: the weights of experts {broken} are not finite; the checkpoint is damaged."
            )
        dot_EE += (flat @ flat.T).double().cpu()
        for expert in range(rank(), num_experts, num_ranks()) if stable_ranks else ():  # ranks share the work
            matrix = stack_EOI[expert].detach().float()
            rank_E[expert] += stable_rank(matrix) / len(matrices)
    norm_E = dot_EE.diagonal().sqrt()
    return {
        "router_norm_E": layer.router_weight.detach().double().norm(dim=1).cpu(),
        "weight_norm_E": norm_E,
        "weight_cosine_EE": dot_EE / (norm_E[:, None] * norm_E).clamp(min=torch.finfo(torch.float64).tiny),
        "stable_rank_E": sum_over_ranks(rank_E.to(layer.router_weight.device)).cpu(),
    }


def stable_rank(matrix: Tensor) -> float:
    """``||M||_F^2 / sigma_max^2``, between 1 and the rank; 0 for a zero matrix."""
    largest = largest_singular_value(matrix)
    return float(matrix.double().square().sum()) / largest**2 if largest else 0.0


def largest_singular_value(matrix: Tensor) -> float:
    """By Golub-Kahan-Lanczos with full reorthogonalisation: matrix-vector products only.

    A full decomposition of Mixtral's 768 expert matrices takes hours; this takes seconds each.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T  # a wide band would need one column more than steps
    steps = min(LANCZOS_STEPS, *matrix.shape)
    lefts, rights = (matrix.new_zeros(steps, size) for size in matrix.shape)
    band = torch.zeros(steps, steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype).to(matrix.device)
    rights[0] = right / right.norm()
    for step in range(steps):
        left = _orthogonal(matrix @ rights[step], lefts[:step])
        length = float(left.norm())
        if length <= 1e-12:
            break
        lefts[step] = left / length
        band[step, step] = length
        if step + 1 == steps:
            break
        right = _orthogonal(matrix.T @ lefts[step], rights[: step + 1])
        length = float(right.norm())
        if length <= 1e-12:
            break
        band[step, step + 1] = length
        rights[step + 1] = right / length
    return float(torch.linalg.matrix_norm(band, ord=2))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Without what lies along the rows of ``basis``; taken away twice, since once leaves what rounding left."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
