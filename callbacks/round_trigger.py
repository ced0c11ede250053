"""When the rounds of pruning inside a fit happen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_moe.errors import InputError

Unit = Literal["steps", "tokens", "epochs"]


class RoundTrigger:
    """The moment of each round, in optimiser steps or epochs ended, as the Trainer counts them, or in tokens seen.

    Args:
        rounds: How many.
        unit: Of all numbers.
        start: Moment of the first round; 0 is the start of the fit.
        every: Between the first two rounds.
        growth: Each further distance over the one before.
        at: The moment of every round, in place of ``start``, ``every`` and ``growth``.
    """

    def __init__(
        self, rounds: int, unit: Unit, start: int, every: int | None, growth: float, at: Sequence[int] | None
    ) -> None:
        if unit not in ("steps", "tokens", "epochs"):
            raise InputError(f"ExpertPruning: unit {unit!r}: one of steps, tokens, epochs.")
        self.every: float | None
        """Length of the last round, which ends where no other begins; None where nothing says it."""
        if at is not None:
            if (
                start
                or every is not None
                or growth != 1
                or list(at) != sorted(set(at))
                or len(at) != rounds
                or min(at) < 0
            ):
                raise InputError(
                    f"ExpertPruning: at {list(at)}: the moment of each of the {rounds} rounds, ascending; start, "
                    "every and growth are then left out."
                )
            self.moments = [float(one) for one in at]
            self.every = self.moments[-1] - self.moments[-2] if rounds > 1 else None
        else:
            if start < 0 or (every is not None and every < 1) or not growth > 0:
                raise InputError(
                    f"ExpertPruning: start {start}: 0 or more; every {every}: at least 1; growth {growth}: above 0."
                )
            if rounds > 1 and every is None:
                raise InputError(
                    f"ExpertPruning: {rounds} rounds: say by `every` how many {unit} lie between them, or `at`."
                )
            steps = [float(every or 0) * growth**turn for turn in range(rounds)]
            self.moments = [start + sum(steps[:turn]) for turn in range(rounds)]
            self.every = steps[-1] if every is not None else None
        self.unit = unit

    def due(self, done: int, now: float) -> bool:
        """Whether, after ``done`` rounds, the next one is to happen ``now``."""
        return done < len(self.moments) and now >= self.moments[done]

    def progress(self, done: int, now: float) -> float:
        """How far the time since the last of ``done`` rounds has run towards the next, from 0 to 1."""
        if done == 0:
            return 0.0
        begin = self.moments[done - 1]
        length = self.moments[done] - begin if done < len(self.moments) else self.every
        return min(max((now - begin) / length, 0.0), 1.0) if length else 0.0
