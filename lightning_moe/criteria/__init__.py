"""Importance criteria: pure functions from statistics to scores, in one registry.

A new criterion is a function in a file of its family, under ``register``; it is then known to every command.
"""

from lightning_moe.criteria import activation, gradient, inference, weight
from lightning_moe.criteria.registry import (
    Criterion,
    Direction,
    criteria,
    get_criterion,
    register,
    register_pairs,
)

__all__ = [
    "Criterion",
    "Direction",
    "activation",
    "criteria",
    "get_criterion",
    "gradient",
    "inference",
    "register",
    "register_pairs",
    "weight",
]
