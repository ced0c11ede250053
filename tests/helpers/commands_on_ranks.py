"""Several commands on several processes, of one start."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_moe.cli.main import main
from tests.helpers.forked_ranks import start_as_torchrun


def commands_on_ranks(
    ranks: int, commands: Sequence[Sequence[object]], strategy: str | Sequence[str] = "moe_fsdp"
) -> None:
    """Carry out all commands; an error is that of the first that fails. One may name a strategy of its own."""
    how = ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks)]
    how += ["--trainer.strategy", strategy] if isinstance(strategy, str) else list(strategy)
    start_as_torchrun(_carry_out, ranks, [[command[0], *how, *map(str, command[1:])] for command in commands])


def _carry_out(commands: list[list[str]]) -> None:
    for command in commands:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        main(command)
