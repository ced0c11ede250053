"""The load-balance loss of a router, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from tests.helpers.reference.vectors import mean, softmax


def load_balance(
    layers: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[int]]]], counted: Sequence[bool]
) -> float:
    """Mean over layers of ``E sum_i f_i P_i`` (Switch Transformer, eq. 4-6), from logits and chosen ids."""
    losses = []
    for logits, chosen in layers:
        num_experts = len(logits[0])
        kept = [t for t, count in enumerate(counted) if count]
        assignments = [expert for t in kept for expert in chosen[t]]
        loss = 0.0
        for expert in range(num_experts):
            share = assignments.count(expert) / len(assignments)
            loss += share * mean([softmax(logits[t])[expert] for t in kept])
        losses.append(num_experts * loss)
    return mean(losses)
