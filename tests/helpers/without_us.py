"""Run a script where lightning_moe is not to be found: only torch and transformers of the same installation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def run_without_us(code: str, root: Path, folder: Path) -> None:
    """Run ``code`` with ``root`` as its argument in a process of its own, in ``folder``, and see that it ends well."""
    script = folder / "without_us.py"
    script.write_text(code)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PATH": "/usr/bin:/bin",
    }
    ended = subprocess.run(
        [sys.executable, "-I", str(script), str(root)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
