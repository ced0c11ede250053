"""diep-step, diep-memory: a step of the search over the two forwards and the backward it cannot do without.

The floor is a forward of the full model without gradients, and a forward and backward to the inputs of the same
frozen model with the next-token loss. Both run in turn inside one fit, so Lightning's own cost counts as ours.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.observe import SETTINGS, TOKENS, random_model
from benchmarks.ratios import QUIET, peak_resident, report
from lightning_moe.modules.causal_lm import Batch, MoECausalLM, next_token_loss
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.search.diep import DiEPSearch

GOAL = 1.10
MEMORY_GOAL = 1.05
WINDOWS = 8
WARMUP = 2


def floor_step(model: MoECausalLM, batch: Batch) -> None:
    """What any search by gradient has to compute."""
    with torch.no_grad():
        teacher = model.decode(batch)
    embeddings = model.network.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model.network(inputs_embeds=embeddings, use_cache=False).logits
    loss_B, count_B = next_token_loss(logits, batch)
    (loss_B.sum() / count_B.sum()).backward()
    assert embeddings.grad is not None and teacher.shape == embeddings.shape


class FloorBeside(Callback):
    """Times each step of a fit, and the floor on the same batch, before or after it in turn."""

    def __init__(self, model: MoECausalLM) -> None:
        self.model = model
        self.ours: list[float] = []
        self.floor: list[float] = []
        self._start = 0.0

    def _time_floor(self, batch: Batch) -> None:
        start = time.perf_counter()
        floor_step(self.model, batch)
        self.floor.append(time.perf_counter() - start)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2:
            self._time_floor(batch)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ours.append(time.perf_counter() - self._start)
        if batch_idx % 2 == 0:
            self._time_floor(batch)


def prepared(setting: tuple[int, int, int]) -> MoECausalLM:
    model = MoECausalLM()
    model.model = random_model(*setting)
    model.moe_layers = find_moe_layers(model.model)
    model.requires_grad_(False)
    return model


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 4096, (count, WINDOWS, TOKENS // WINDOWS), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def fit(model: MoECausalLM, steps: int, callbacks: list[Callback]) -> None:
    trainer = Trainer(
        max_steps=steps,
        logger=False,
        callbacks=callbacks,
        **QUIET,
    )
    trainer.fit(DiEPSearch(model, updates=steps), DataLoader(batches(steps), batch_size=None))  # type: ignore[arg-type]


def peak_bytes(setting: str, ours: bool) -> int:
    """Most memory above that of the loaded model, in a process of its own."""
    side = "ours" if ours else "floor"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.diep_step", setting, side], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def measure_peak(setting: str, side: str) -> None:
    """Print the bytes; the measuring process calls this in another."""
    model = prepared(SETTINGS[setting])
    before = _resident()
    if side == "ours":
        fit(model, 3, [])
    else:
        for batch in batches(3):
            floor_step(model, batch)
    print(peak_resident() - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(repeats: int = 12) -> None:
    """The slower, and the larger, of the two settings."""
    seconds, memory = [], []
    for name, setting in SETTINGS.items():
        model = prepared(setting)
        beside = FloorBeside(model)
        fit(model, WARMUP + repeats, [beside])
        pairs = zip(beside.ours[WARMUP:], beside.floor[WARMUP:], strict=True)
        seconds.append(statistics.median(ours / floor for ours, floor in pairs))
        memory.append(peak_bytes(name, ours=True) / peak_bytes(name, ours=False))
    report("diep-step", max(seconds), GOAL)
    report("diep-memory", max(memory), MEMORY_GOAL)


if __name__ == "__main__":
    measure_peak(*sys.argv[1:]) if len(sys.argv) > 1 else main()
