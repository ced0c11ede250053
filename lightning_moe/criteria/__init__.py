"""Importance criteria: pure functions from statistics to scores, in one registry.

A new criterion is a function in a file of its family, under ``register``; it is then known to every command. The
gradient family of MC-Suite (EGS, EGE, EGO, EGN) will stand beside these three in ``gradient.py``.
"""

from lightning_moe.criteria import activation, inference, weight
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
    "inference",
    "register",
    "register_pairs",
    "weight",
]
