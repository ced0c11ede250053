"""Somebody's logger that keeps what it is given."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class Logs(Logger):
    """Keeps what comes with metrics under one prefix, and when it came."""

    name, version = "logs", 0

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # type: ignore[override]
        if any(name.startswith(self.prefix) for name in metrics):
            self.metrics.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass
