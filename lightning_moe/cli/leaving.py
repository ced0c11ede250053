"""Leaving: the last line of a command that failed, said once, whatever the number of its processes."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Iterable
from subprocess import Popen
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities import rank_zero_only

GO_ON = "The same command goes on from the last finished step."

PATIENCE = 5.0
"""Seconds that other ranks leave rank 0 to say what is wrong; it, or whoever launched them, ends them meanwhile."""

LOST = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|timed? ?out|remote process|ncclremote",
    re.IGNORECASE,
)

UNWRITTEN = re.compile(
    r"no space left[\w ]*|file too large|disk quota exceeded|PytorchStreamWriter failed writing file", re.IGNORECASE
)


def failed_write(error: BaseException) -> str | None:
    """What torch or safetensors say of a file that they could not write, in a few words; None of other errors."""
    found = UNWRITTEN.search(str(error))
    return None if found is None else found[0]


def lost_rank(error: BaseException) -> str | None:
    """What torch.distributed says of another process that does not answer, in a sentence; None of other errors."""
    # While the group is forming there is no group yet, but errors of its own kind.
    forming = torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
    if not (forming or _several()):
        return None
    sentences = re.split(r"(?<=\w)\. |\n", re.sub(r"^\[\S+\] ", "", str(error)))
    return next((sentence for sentence in sentences if LOST.search(sentence)), None)


def leave(message: str, children: Iterable[Popen[Any]] = ()) -> NoReturn:
    """Say what is wrong and end with exit code 2, and so the ranks that this one started; rank 0 speaks for all."""
    rank = getattr(rank_zero_only, "rank", 0)
    if rank:
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    print(f"lightning-moe: {message}", file=sys.stderr, flush=True)
    stop(2, children)


def stop(code: int, children: Iterable[Popen[Any]] = ()) -> NoReturn:
    """End with this exit code, and so the ranks that this one started."""
    for child in children:
        child.kill()  # on GPUs they might wait for this one for half an hour
    if _several():
        os._exit(code)  # an ordinary end would wait for processes that are gone
    sys.exit(code)


def part() -> None:
    """Part from the other ranks while the interpreter is whole.

    gloo's threads may hold tensors a moment longer than the work on them takes; a thread that lets go of one while
    Python is torn down ends the process by SIGABRT, after all was done. Without its users a group ends its threads.
    """
    if _several():
        gc.collect()  # modules and meshes that hold groups
        torch.distributed.destroy_process_group()


def _several() -> bool:
    return bool(
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
