"""A program of its own: run commands one after another and print the peak of anonymous memory of each, as JSON.

``python peak_memory.py JOBS_FILE OUT_FOLDER``: JOBS_FILE holds pairs ``{"name": [warm-up arguments, arguments]}``. What
programs bring along (imports, figures, process groups) is there after the warm-up, from which on a job's memory counts.
Every rank writes ``OUT_FOLDER/rank-R.json``. Anonymous memory is what a process made: files that are mapped, as
checkpoints are, are not in it, unlike in ``ru_maxrss``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Forget what was before."""
        with self._lock:
            self.most = 0

    def run(self) -> None:
        while True:
            size = anonymous_bytes()
            with self._lock:  # else what ``begin`` forgets might be put back
                self.most = max(self.most, size)
            time.sleep(0.003)


def main() -> None:
    jobs_file, out = Path(sys.argv[1]), Path(sys.argv[2])
    import torch

    from lightning_moe.cli.main import main as command

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    peak = Peak()
    peak.start()
    peaks, seconds = {}, {}
    for name, (warm_up, args) in json.loads(jobs_file.read_text()).items():
        command(warm_up)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before, start = anonymous_bytes(), time.perf_counter()
        peak.begin()
        command(args)
        peaks[name], seconds[name] = peak.most - before, time.perf_counter() - start
    found = {"peaks": peaks, "seconds": seconds}
    (out / f"rank-{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
