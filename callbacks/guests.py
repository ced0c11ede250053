"""Callbacks that a Trainer has for one loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, Trainer


@contextmanager
def guests(trainer: Trainer, *callbacks: Callback) -> Iterator[None]:
    """Inside the context ``callbacks`` are among the Trainer's own, after all others."""
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
