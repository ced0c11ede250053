"""``demo``: the main job on the bundled reference model, from observing to a table."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file

from lightning_moe.cli.cut import Cut
from lightning_moe.cli.display import show_perplexities
from lightning_moe.cli.prune import prune
from lightning_moe.cli.request import checkpoint_size
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.score import score
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import measure
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import load_model, model_id
from lightning_moe.pruning.budget import Scope
from lightning_moe.reference import MODEL, TEXT

SEQ_LEN = 256
CALIBRATION_WINDOWS = 192
VALIDATION_WINDOWS = 144

METHODS: list[tuple[str, Scope]] = [
    ("random", "layer"),
    ("ean", "layer"),
    ("reap-sum", "layer"),
    ("reap-sum", "global"),
]
RATIOS = (0.25, 0.5)

STOCK_LOADING = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert not any(name.startswith("lightning_moe") for name in sys.modules)
ids = torch.arange(3, 67).unsqueeze(0)
out = {path: AutoModelForCausalLM.from_pretrained(path)(ids).logits.detach() for path in sys.argv[2:]}
save_file(out, sys.argv[1])
"""
"""Run in a process of its own, which knows nothing of this package."""


def demo(trainer: Trainer, out: str, overwrite: bool) -> None:
    """Observe, score, drop 25% and 50% of the experts by several criteria, save, reload, measure, print."""
    console = Console()
    run = RunFolder(out, "demo", {"model_id": model_id(str(MODEL))}, overwrite)
    calibration, validation = _text("calibration", CALIBRATION_WINDOWS), _text("validation", VALIDATION_WINDOWS)
    console.print("[bold]1. Observe[/bold] the reference model on calibration text; score its experts.")
    score(trainer, MoECausalLM(str(MODEL)), calibration, str(run.folder / "score"), overwrite)
    cuts = list(product(RATIOS, METHODS))
    console.print(f"[bold]2. Prune[/bold] it {len(cuts)} ways from these statistics; save each smaller model.")
    folders = {"full": MODEL}
    for ratio, (method, scope) in cuts:
        name = f"{method} {scope} -{ratio:.0%}"
        folder = run.folder / f"{method}-{scope}-{100 * ratio:g}"
        stats = str(run.folder / "score" / "stats.safetensors")
        cut = Cut(method, ratio, scope)
        prune(trainer, MoECausalLM(str(MODEL)), TextDataModule(), str(folder), cut, stats, None, None, overwrite)
        folders[name] = folder / "model"
    uniform = {name: folder for name, folder in folders.items() if "global" not in name}
    console.print(f"[bold]3. Reload[/bold] the {len(uniform)} uniform ones in stock transformers, in another process.")
    reloaded = _stock_reload(uniform, run.folder)
    console.print("[bold]4. Measure[/bold] each on validation text.")
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        console.print(f"   {name}")
        rows[name] = measure(trainer, MoECausalLM(str(folder)), validation) | checkpoint_size(str(folder))
        rows[name]["loaded_by"] = "stock" if reloaded.get(name) else "lightning_moe"
    show_perplexities(rows)
    console.print(f"Measured on {rows['full']['tokens']:,} tokens. All models and figures are in {run.folder}.")
    run.finish({"models": rows})


def _text(split: str, windows: int) -> TextDataModule:
    return TextDataModule(str(TEXT / split), tokenizer=str(MODEL), seq_len=SEQ_LEN, samples=windows, batch_size=16)


def _stock_reload(folders: dict[str, Path], scratch: Path) -> dict[str, bool]:
    """Whether each folder gives the same logits in a process without this package as in this one."""
    file = scratch / "stock-logits.safetensors"
    # -I: neither this folder nor the environment leads the other process to our package.
    command = [sys.executable, "-I", "-c", STOCK_LOADING, str(file), *map(str, folders.values())]
    other = subprocess.run(command, capture_output=True, text=True)
    if other.returncode:
        raise RuntimeError(f"stock transformers could not load the pruned models:\n{other.stderr}")
    logits = load_file(file)
    ids = torch.arange(3, 67).unsqueeze(0)
    same = {}
    for name, folder in folders.items():
        with torch.no_grad():
            ours = load_model(str(folder))(ids).logits
        same[name] = torch.equal(ours, logits[str(folder)])
        if not same[name]:
            raise RuntimeError(f"{folder}: stock transformers gives other logits than this process")
    file.unlink()
    return same
