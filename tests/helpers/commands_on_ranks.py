"""Several commands on several processes, as torchrun starts them, of one start: each takes seconds."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch

from lightning_moe.cli.leaving import part
from lightning_moe.cli.main import main
from tests.helpers.forked_ranks import start_ranks


def commands_on_ranks(
    ranks: int, commands: Sequence[Sequence[object]], strategy: str | Sequence[str] = "moe_fsdp"
) -> None:
    """Carry out all commands; an error is that of the first that fails. One may name a strategy of its own."""
    how = ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks)]
    how += ["--trainer.strategy", strategy] if isinstance(strategy, str) else list(strategy)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_work, ranks, ranks, port, [[command[0], *how, *map(str, command[1:])] for command in commands])


def _work(rank: int, ranks: int, port: int, commands: list[list[str]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    for command in commands:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        main(command)
    part()
