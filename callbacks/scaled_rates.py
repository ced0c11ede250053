"""Learning rates scaled for the time of each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
