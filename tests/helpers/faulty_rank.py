"""A command of which one process has a fault; run by torchrun as ``-m tests.helpers.faulty_rank FAULT COMMAND...``."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from lightning_moe.cli.main import main


def with_value(words: list[str], option: str, value: str) -> list[str]:
    return [value if place and words[place - 1] == option else word for place, word in enumerate(words)]


if __name__ == "__main__":
    fault, *words = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    if fault == "other-text" and rank == 1:
        words = with_value(words, "--data.path", os.environ["OTHER"])
    if fault == "other-model" and rank == 1:
        words = with_value(words, "--model.path", os.environ["OTHER"])
    if fault == "full-disk" and rank == 0:
        import lightning_moe.moe.export as export

        stock = export.write_shards

        def write_little(*args: Any, **kwargs: Any) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            stock(*args, **kwargs)

        export.write_shards = write_little
    if fault == "dies" and rank == int(os.environ["DIES"]):
        import lightning_moe.cli.rounds as rounds

        place = os.environ["DURING"]
        work, calls = getattr(rounds, place), []

        def die(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        setattr(rounds, place, die)
    assert Path("train.py").is_file()
    main(words)
