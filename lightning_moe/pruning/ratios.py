"""Ratios: what a share comes to in whole things, and which shares are possible."""

from __future__ import annotations

from collections.abc import Sequence

MOST_RATIOS_NAMED = 12


def ratio_list(possible: Sequence[str]) -> str:
    """Ratios in words, the middle of many left out."""
    if len(possible) > MOST_RATIOS_NAMED:
        possible = [*possible[: MOST_RATIOS_NAMED // 2], "...", *possible[-MOST_RATIOS_NAMED // 2 :]]
    return ", ".join(possible)


def named_ratio(drop: int, total: int) -> str:
    """A short number that, given as a ratio, drops exactly ``drop`` of ``total``."""
    names = (f"{drop / total:.{digits}g}" for digits in range(4, 18))
    return next(name for name in names if rounded(float(name) * total) == drop)


def rounded(value: float) -> int:
    """Half rounds up, as people expect; 1e-9 forgives ratios such as 0.29 that floats store from below."""
    return int(value + 0.5 + 1e-9)
