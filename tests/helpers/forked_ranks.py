"""Several processes that begin where the libraries are imported already: a start takes no seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

PRELOADED = ["lightning_moe.cli.main", "lightning_moe.modules.router_distillation", "tests.helpers.families"]


def start_ranks(work: Callable[..., None], ranks: int, *args: Any) -> None:
    """Call ``work(rank, *args)`` in every process and wait for all; raises what one of them raised.

    They are forked from a server that has imported, and done, nothing else: no threads, no files of a test.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)  # heeded when the server starts, by the first call
    start_processes(work, args, nprocs=ranks, start_method="forkserver")
