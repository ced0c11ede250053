"""Learning rates scaled for the time of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class RoundCosine:
    """Multiplies learning rates by a cosine from 1 down to ``lowest`` while ``progress()`` goes from 0 to 1."""

    def __init__(self, progress: Callable[[], float], lowest: float) -> None:
        self._progress, self._lowest = progress, lowest
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Scale these from now on, and none that came before, which hold on to their weights."""
        self.end()
        for optimizer in optimizers:
            self._handles += scale_rates(optimizer, self._factor)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _factor(self) -> float:
        return self._lowest + (1 - self._lowest) * 0.5 * (1 + math.cos(math.pi * self._progress()))


def scale_rates(optimizer: torch.optim.Optimizer, factor: Callable[[], float]) -> list[Any]:
    """Multiply the learning rates by ``factor()`` within each step; schedulers and monitors never see it.

    Returns handles whose ``remove`` ends it.
    """
    rates: list[float] = []

    # torch calls these hooks again within a step that calls that of its parent class: only the outermost scales.
    def scale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if rates:
            return
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor()

    def restore(*args: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        rates.clear()

    class Restoring:
        """Puts a step right that failed midway."""

        def remove(self) -> None:
            restore()

    return [optimizer.register_step_pre_hook(scale), optimizer.register_step_post_hook(restore), Restoring()]
