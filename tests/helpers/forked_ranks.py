"""Several processes that begin where the libraries are imported already: a start takes no seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

from lightning_moe.cli.leaving import part

PRELOADED = ["lightning_moe.cli.main", "lightning_moe.modules.router_distillation", "tests.helpers.families"]


def start_ranks(work: Callable[..., None], ranks: int, *args: Any) -> None:
    """Call ``work(rank, *args)`` in every process and wait for all; raises what one of them raised.

    They are forked from a server that has imported, and done, nothing else: no threads, no files of a test.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)  # heeded when the server starts, by the first call
    start_processes(_work, (dict(os.environ), work, args), nprocs=ranks, start_method="forkserver")


def _work(rank: int, environment: dict[str, str], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()  # of the server, as it was when it started
    os.environ.update(environment)
    work(rank, *args)


def start_as_torchrun(work: Callable[..., None], ranks: int, *args: Any) -> None:
    """Call ``work(*args)`` in every process, which finds in its environment what torchrun leaves there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_as_torchrun, ranks, ranks, port, work, args)


def _as_torchrun(rank: int, ranks: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    work(*args)
    part()
