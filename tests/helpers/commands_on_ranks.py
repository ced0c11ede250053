"""Several commands on several processes, of one start: each takes seconds, a start takes more.

``commands_on_ranks(N, folder, commands, ...)`` runs this file by torchrun on N processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_moe.cli.leaving import part
from lightning_moe.cli.main import main

ROOT = Path(__file__).parents[2]


def commands_on_ranks(
    ranks: int, folder: Path, commands: Sequence[Sequence[object]], strategy: str | Sequence[str] = "moe_fsdp"
) -> None:
    """Carry out all commands; an error is that of the first that fails. One may name a strategy of its own."""
    how = ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks)]
    how += ["--trainer.strategy", strategy] if isinstance(strategy, str) else list(strategy)
    file = folder / f"commands-{ranks}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps([[command[0], *how, *map(str, command[1:])] for command in commands]))
    own = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        + ["-m", "tests.helpers.commands_on_ranks", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=own | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        main(command)
    part()
