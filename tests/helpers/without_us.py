"""Run a script where lightning_moe is not to be found: only torch and transformers of the same installation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HIDE_US = """
import sys


class NoLightningMoE:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning_moe":
            raise ImportError("lightning_moe is not installed here")


sys.meta_path.insert(0, NoLightningMoE())
try:
    import lightning_moe
except ImportError:
    pass
else:
    raise AssertionError("lightning_moe can be imported")
"""


def run_without_us(code: str, root: Path, folder: Path) -> None:
    """Run ``code`` with ``root`` as its argument in a process of its own, in ``folder``, and see that it ends well."""
    script = folder / "without_us.py"
    script.write_text(HIDE_US + code)
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
