"""Vectors in Python numbers, one entry at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = list[float]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = norm(a) * norm(b)
    return dot(a, b) / lengths if lengths else 0.0


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def standard_deviation(values: Sequence[float]) -> float:
    """Of the whole population: divided by n."""
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values]))


def softmax(logits: Sequence[float]) -> Vector:
    highest = max(logits)
    powers = [math.exp(x - highest) for x in logits]
    return [x / math.fsum(powers) for x in powers]
