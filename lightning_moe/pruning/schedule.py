"""RoundSchedule: how much is dropped in each round, and how long the model is tuned after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.pruning.budget import Scope, blank_scores, make_plan
from lightning_moe.pruning.plan import cut_shapes

Spacing = Literal["equal", "cosine"]
"""Steps of one size, or small at both ends and large in the middle (half a cosine)."""


@dataclass(frozen=True)
class RoundSchedule:
    """One entry per round."""

    ratios: tuple[float, ...]
    """Share of the experts of the whole model that is gone after each round, ascending."""
    tokens: tuple[int, ...]
    """Tokens of fine-tuning after each round; 0 for none."""

    def __len__(self) -> int:
        return len(self.ratios)

    def up_to(self, ratio: float) -> RoundSchedule:
        """The rounds until ``ratio`` is reached."""
        count = self.ratios.index(ratio) + 1
        return RoundSchedule(self.ratios[:count], self.tokens[:count])


def make_schedule(
    ratio: float,
    rounds: int | Sequence[float],
    spacing: Spacing = "equal",
    first_tokens: int = 0,
    growth: float = 2.0,
) -> RoundSchedule:
    """Rounds up to ``ratio``: so many, or those whose shares are listed, the last of them ``ratio``.

    The budget of tokens grows by ``growth`` from round to round (MC-Suite: it doubles).
    """
    if isinstance(rounds, int):
        if rounds < 1:
            raise InputError(f"--rounds {rounds}: at least 1.")
        parts = [turn / rounds for turn in range(1, rounds + 1)]
        if spacing == "cosine":
            parts = [(1 - math.cos(math.pi * part)) / 2 for part in parts]
        ratios = [*(round(ratio * part, 12) for part in parts[:-1]), ratio]
    else:
        ratios = [float(one) for one in rounds]
        if not ratios or sorted(set(ratios)) != ratios or not ratios[0] > 0 or ratios[-1] != ratio:
            raise InputError(
                f"--rounds {list(rounds)}: a list must hold the shares gone after each round, ascending, and end with "
                f"the ratio asked for, {ratio}."
            )
    if first_tokens < 0:
        raise InputError(f"--finetune_tokens {first_tokens}: 0 or more.")
    if not 0 < growth < math.inf:
        raise InputError(f"--finetune_growth {growth}: above 0, and finite.")
    try:
        tokens = [round(first_tokens and first_tokens * growth**turn) for turn in range(len(ratios))]
    except OverflowError as error:
        raise InputError(
            f"--finetune_growth {growth}: over {len(ratios)} rounds that is more tokens than can be counted."
        ) from error
    return RoundSchedule(tuple(ratios), tuple(tokens))


def round_seed(seed: int, turn: int) -> int:
    """The seed of a round, counted from 1: that of the first is the run's own."""
    return seed + 1009 * (turn - 1)


def check_rounds(shapes: Sequence[LayerShape], schedule: RoundSchedule, scope: Scope, floor: int | None = None) -> None:
    """Raise ``InputError``, before anything is run, when a round of the schedule can drop nothing or too much.

    What layers hold after a round under global scope depends on the scores; equal ones stand for them here.
    """
    now = list(shapes)
    for turn, ratio in enumerate(schedule.ratios, start=1):
        try:
            now = cut_shapes(now, make_plan(blank_scores(now), ratio, scope, floor, whole=shapes).keep)
        except InputError as error:
            raise InputError(f"round {turn} of {len(schedule)}: {error}") from error
