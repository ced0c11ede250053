"""Ratios of our cost to a floor, both timed in turn in one process.

Each benchmark prints one line ``NAME ratio=R goal=G``, the median over interleaved repetitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that does nothing beside its loop."""


def median_ratio(ours: Callable[[], object], floor: Callable[[], object], repeats: int, warmup: int = 2) -> float:
    """Median of ours / floor, pair by pair, so that drift of the machine's speed cancels."""
    for _ in range(warmup):
        ours()
        floor()
    ratios = []
    for repeat in range(repeats):
        # Alternate who goes first: the second of a pair finds warmer caches.
        first, second = (ours, floor) if repeat % 2 else (floor, ours)
        seconds = {first: seconds_of(first), second: seconds_of(second)}
        ratios.append(seconds[ours] / seconds[floor])
    return statistics.median(ratios)


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_resident() -> int:
    """Most memory this process ever held, in bytes.

    Not ``ru_maxrss``, which a new process takes over from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def report(name: str, ratio: float, goal: float) -> None:
    print(f"{name} ratio={ratio:.3f} goal={goal:.2f}", flush=True)
