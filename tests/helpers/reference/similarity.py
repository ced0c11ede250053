"""How alike experts are, from outputs for the same tokens: HSIC and CKA, a pair of experts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.reference.raw_layers import RawLayer
from tests.helpers.reference.vectors import Vector, dot


def skipping_stats(raw: RawLayer, most: int = 16) -> dict[str, Any]:
    """The ratios of weights in 4096 bins, and the HSIC sums of pairs, on at most ``most`` tokens of a sequence."""
    experts = range(raw.num_experts)
    histogram, cross, own = (
        [0.0] * 4096,
        [[0.0] * len(experts) for _ in experts],
        [[0.0] * len(experts) for _ in experts],
    )
    for token in raw.tokens:
        if len(token.visits) > 1:
            # In float32, as routers reckon, so that a ratio on the edge of a bin falls on the same side.
            first, second = sorted((torch.tensor(visit.weight) for visit in token.visits), reverse=True)[:2]
            histogram[min(4095, int((second / first if first else first) * 4096))] += 1
    for sequence in {token.sequence for token in raw.tokens}:
        for p in experts:
            for q in experts:
                both = [t for t in raw.tokens if t.sequence == sequence and {p, q} <= set(raw.chosen(t))][:most]
                if p == q or len(both) < 4:
                    continue
                outputs = [[next(v.output for v in t.visits if v.expert == e) for t in both] for e in (p, q)]
                K, L = (u_centred(gram(rows)) for rows in outputs)
                weight = len(both) / (len(both) * (len(both) - 3))
                cross[p][q] += weight * float((K * L).sum())
                own[p][q] += weight * float((K * K).sum())
    return {"ratio_R": histogram, "hsic_EE": cross, "own_hsic_EE": own}


def gram(rows: Sequence[Vector]) -> Tensor:
    return torch.tensor([[dot(a, b) for b in rows] for a in rows], dtype=torch.float64)


def u_centred(K: Tensor) -> Tensor:
    """As Szekely and Rizzo (2014) centre: their inner product is the unbiased HSIC in another form."""
    n = K.shape[0]
    K = K - torch.diag(K.diagonal())
    centred = K - K.sum(0) / (n - 2) - K.sum(1)[:, None] / (n - 2) + K.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Of all tokens at once, rows centred (Kornblith et al. 2019, eq. 4)."""
    X, Y = (rows.double() - rows.double().mean(0) for rows in (X, Y))
    return float((X.T @ Y).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm()))
