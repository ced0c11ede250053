"""The sums and the weight figures of ``LayerStats``, token by token, from what happened at a layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.helpers.reference.raw_layers import RawLayer
from tests.helpers.reference.similarity import skipping_stats
from tests.helpers.reference.vectors import Vector, mean, norm, standard_deviation


def layer_stats(raw: RawLayer) -> dict[str, Any]:
    """Every sum over tokens, by the name of its field in ``LayerStats``."""
    experts, width = range(raw.num_experts), len(raw.tokens[0].visits[0].output)
    stats: dict[str, Any] = {"tokens": len(raw.tokens)}
    stats["layer_cosine"], stats["block_cosine"] = raw.cosines
    for name in ("count_E", "probability_E", "soft_count_E", "norm_E", "norm_sq_E", "gated_norm_E", "outliers_E"):
        stats[name] = [0.0] * raw.num_experts
    for name in ("output_sum_EH", "output_sq_EH", "unit_sum_EH"):
        stats[name] = [[0.0] * width for _ in experts]
    for name in ("together_EE", "logit_products_EE"):
        stats[name] = [[0.0] * raw.num_experts for _ in experts]
    stats["seen_EV"] = [[token_id in raw.token_ids(expert) for token_id in range(raw.vocab_size)] for expert in experts]
    for token in raw.tokens:
        chosen = raw.chosen(token)
        total = math.fsum(visit.weight for visit in token.visits)
        logits = token.logits or [math.log(p) if p else 0.0 for p in token.probabilities]
        for p in experts:
            stats["probability_E"][p] += token.probabilities[p]
            for q in experts:
                stats["together_EE"][p][q] += p in chosen and q in chosen
                stats["logit_products_EE"][p][q] += logits[p] * logits[q]
        for visit in token.visits:
            p, length = visit.expert, norm(visit.output)
            stats["count_E"][p] += 1
            stats["soft_count_E"][p] += token.probabilities[p]
            stats["norm_E"][p] += length
            stats["norm_sq_E"][p] += length**2
            stats["gated_norm_E"][p] += visit.weight / total * length
            stats["outliers_E"][p] += outliers(visit.output)
            for j, value in enumerate(visit.output):
                stats["output_sum_EH"][p][j] += value
                stats["output_sq_EH"][p][j] += value**2
                stats["unit_sum_EH"][p][j] += value / length if length else 0.0
    return stats | skipping_stats(raw)


def outliers(output: Vector) -> int:
    middle, spread = mean(output), standard_deviation(output)
    return sum(abs(value - middle) > 3 * spread for value in output)


def weight_stats(raw: RawLayer) -> dict[str, Any]:
    flat = [torch.cat([matrix.double().flatten() for matrix in matrices]) for matrices in raw.matrices]
    return {
        "router_norm_E": [norm(row) for row in raw.router_rows],
        "weight_norm_E": [float(f.norm()) for f in flat],
        "weight_cosine_EE": [[float(f @ g / (f.norm() * g.norm())) for g in flat] for f in flat],
        "stable_rank_E": [mean([stable_rank(matrix) for matrix in matrices]) for matrices in raw.matrices],
    }


def stable_rank(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0
