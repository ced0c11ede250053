"""Presets: the searches that have a name."""

from __future__ import annotations

import difflib
from typing import Any

from lightning_moe.errors import InputError

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # DiEP as printed: Eq. 5-7, 10; 10 epochs of 128 windows in batches of 16. Optimiser and start are not stated.
    "paper": {
        "relaxation": "literal",
        "relative": False,
        "weight": 0.01,
        "pressure": 0.0,
        "lr": 5e-3,
        "min_lr_ratio": 0.0,
        "score": "raw",
        "updates": 80,
    },
    # The paper's ablation, on our relaxation.
    "alpha": {"betas": "fixed"},
    "beta-frequency": {"learn_alpha": False, "score": "frequency"},
    "1:2": {"betas": "1:2"},
    "2:1": {"betas": "2:1"},
    "3:1": {"betas": "3:1"},
    "random": {"betas": "random"},
}
"""Arguments of ``DiEPSearch`` by preset; what one does not name is the class's default."""


def preset(name: str) -> dict[str, Any]:
    """The arguments of a preset; an unknown name is refused with the nearest known one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise InputError(f"--preset {name}: no such preset.{hint} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]
