"""Criteria in Python numbers, one token, one expert, one pair at a time.

Formulas are written from the papers (MC-Suite 2504.05586, REAP 2510.13999, MAN 2606.15716, SEER-MoE 2404.05089,
Expert Trimming 2406.02500), never from the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.helpers.reference.gradients import ege, egn, ego, egs
from tests.helpers.reference.raw_layers import RawLayer
from tests.helpers.reference.statistics import outliers, stable_rank, weight_stats
from tests.helpers.reference.vectors import Vector, cosine, mean, norm, standard_deviation


def ews(raw: RawLayer) -> Vector:
    cosines = weight_stats(raw)["weight_cosine_EE"]
    return [math.fsum(row) - row[p] for p, row in enumerate(cosines)]


def rwn(raw: RawLayer) -> Vector:
    return [norm(row) for row in raw.router_rows]


def wsr(raw: RawLayer) -> Vector:
    return [mean([stable_rank(matrix) for matrix in matrices]) for matrices in raw.matrices]


def ewn(raw: RawLayer) -> Vector:
    return [math.sqrt(math.fsum(float(m.double().square().sum()) for m in matrices)) for matrices in raw.matrices]


def euf(raw: RawLayer) -> Vector:
    return [float(len(raw.outputs(p))) for p in range(raw.num_experts)]


def evc(raw: RawLayer) -> Vector:
    return [len(raw.token_ids(p)) / raw.vocab_size for p in range(raw.num_experts)]


def eas(raw: RawLayer) -> Vector:
    """Mean cosine between all outputs of p and all outputs of q, summed over q, minus the diagonal."""
    scores = []
    for p in range(raw.num_experts):
        score = 0.0
        for q in range(raw.num_experts):
            if q != p:
                score += mean([cosine(a, b) for a in raw.outputs(p) for b in raw.outputs(q)])
        scores.append(score)
    return scores


def eae(raw: RawLayer) -> Vector:
    """Sum of log std per dimension; a std of 0 counts as 1e-12, or the log would not be a number."""
    width = len(raw.tokens[0].visits[0].output)
    scores = []
    for p in range(raw.num_experts):
        columns = [[output[j] for output in raw.outputs(p)] for j in range(width)]
        scores.append(math.fsum(math.log(max(standard_deviation(column), 1e-12)) for column in columns))
    return scores


def eao(raw: RawLayer) -> Vector:
    return [float(sum(outliers(output) for output in raw.outputs(p))) for p in range(raw.num_experts)]


def ean(raw: RawLayer) -> Vector:
    width = len(raw.tokens[0].visits[0].output)
    return [
        math.fsum(norm([output[j] for output in raw.outputs(p)]) for j in range(width)) for p in range(raw.num_experts)
    ]


def _gated_norms(raw: RawLayer, expert: int) -> Vector:
    return [
        visit.weight / math.fsum(other.weight for other in token.visits) * norm(visit.output)
        for token in raw.tokens
        for visit in token.visits
        if visit.expert == expert
    ]


def reap(raw: RawLayer) -> Vector:
    return [mean(_gated_norms(raw, p)) for p in range(raw.num_experts)]


def reap_sum(raw: RawLayer) -> Vector:
    return [math.fsum(_gated_norms(raw, p)) for p in range(raw.num_experts)]


def man(raw: RawLayer) -> Vector:
    return [mean([norm(output) for output in raw.outputs(p)]) for p in range(raw.num_experts)]


def msan(raw: RawLayer) -> Vector:
    return [mean([norm(output) ** 2 for output in raw.outputs(p)]) for p in range(raw.num_experts)]


def seer(raw: RawLayer) -> Vector:
    return [
        math.fsum(token.probabilities[p] for token in raw.tokens if p in raw.chosen(token))
        for p in range(raw.num_experts)
    ]


def trimming(raw: RawLayer) -> Vector:
    return [mean([token.probabilities[p] for token in raw.tokens]) for p in range(raw.num_experts)]


def ecc(raw: RawLayer) -> list[Vector]:
    experts = range(raw.num_experts)
    return [[float(sum({p, q} <= set(raw.chosen(token)) for token in raw.tokens)) for q in experts] for p in experts]


def ets(raw: RawLayer) -> list[Vector]:
    experts = range(raw.num_experts)
    return [[float(len(raw.token_ids(p) & raw.token_ids(q))) for q in experts] for p in experts]


MEASURES = {
    "ews": ews,
    "rwn": rwn,
    "wsr": wsr,
    "ewn": ewn,
    "euf": euf,
    "evc": evc,
    "eas": eas,
    "eae": eae,
    "eao": eao,
    "ean": ean,
    "egs": egs,
    "ege": ege,
    "ego": ego,
    "egn": egn,
    "reap": reap,
    "reap-sum": reap_sum,
    "man": man,
    "msan": msan,
    "seer": seer,
    "trimming": trimming,
}
"""A number per expert."""

PAIR_MEASURES = {"ecc": ecc, "ets": ets}
"""A number per pair of experts."""


def drop_turns(pairs: Sequence[Sequence[float]], counts: Sequence[float], direction: str) -> list[int]:
    """The turn at which each expert goes: of the pair at the extreme, the one less used; the last one never goes.

    Ties: the first pair in reading order; of two used alike, the second.
    """
    left = list(range(len(counts)))
    turns = [len(counts) - 1] * len(counts)
    for turn in range(len(counts) - 1):
        candidates = [(pairs[p][q], p, q) for p in left for q in left if p < q]
        extreme = (max if direction == "max" else min)(value for value, _, _ in candidates)
        p, q = next((p, q) for value, p, q in candidates if value == extreme)
        dropped = p if counts[p] < counts[q] else q
        turns[dropped] = turn
        left.remove(dropped)
    return turns
