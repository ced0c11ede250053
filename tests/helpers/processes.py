"""The program in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def train_py(*args: object, launch: Sequence[str] = (), **kwargs: Any) -> subprocess.Popen[str]:
    """Start the program, by ``launch`` if given; what a test of this process left in the environment stays here."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    return subprocess.Popen(
        [sys.executable, *launch, str(ROOT / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        **kwargs,
    )


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until something is there, while the process lives."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
