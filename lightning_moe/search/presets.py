"""Presets: the searches that have a name."""

from __future__ import annotations

from typing import Any

from lightning_moe.errors import InputError, did_you_mean

PAPER: dict[str, Any] = {
    "relaxation": "literal",
    "relative": False,
    "weight": 0.01,
    "pressure": 0.0,
    "lr": 5e-3,
    "min_lr_ratio": 0.0,
    "score": "raw",
    "updates": 80,
}
"""DiEP as printed: Eq. 5-7, 10. 80 updates are its 10 epochs of 128 windows with ``--data.samples 128`` and
``--data.batch_size 16``. Optimiser and start are not stated."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    # The same with the score that does not change its order when beta turns negative.
    "paper-gate": PAPER | {"score": "gate"},
    # The paper's ablation, on our relaxation. The pressure moves betas alone, since the alphas of a layer always share
    # out the same sum; so where beta is not learned there is no pressure.
    "alpha": {"betas": "fixed"},
    "beta-frequency": {"learn_alpha": False, "score": "frequency"},
    "1:2": {"betas": "1:2"},
    "2:1": {"betas": "2:1"},
    "3:1": {"betas": "3:1"},
    "random": {"betas": "random"},
}
"""Arguments of ``DiEPSearch`` by preset; what one does not name is the class's default."""


SEARCH = "diep"
"""The method that is a search; ``diep-PRESET`` names a preset other than the default."""


def method_of(preset_name: str) -> str:
    """What methods call the search with a preset."""
    return SEARCH if preset_name == "default" else f"{SEARCH}-{preset_name}"


def preset_of(method: str) -> str | None:
    """The preset that a method's name asks for, known or not; None where it is no search."""
    search, _, name = method.partition("-")
    return (name or "default") if search == SEARCH else None


def preset(name: str) -> dict[str, Any]:
    """The arguments of a preset; an unknown name is refused with the nearest known one."""
    if name not in PRESETS:
        raise InputError(f"--preset {name}: no such preset.{did_you_mean(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]
