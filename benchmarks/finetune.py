"""finetune-pruned, finetune-pruned-memory, finetune-callbacks: what a step of tuning costs.

The first two are a step (forward, backward, AdamW) of a model that lost half of its experts over one of the whole
model: every token still goes to top-k experts, so what falls is the work on weights, not that on tokens. The third is
a step with our callbacks between two rounds over a bare one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from benchmarks.diep_step import batches
from benchmarks.observe import SETTINGS, random_model
from benchmarks.ratios import QUIET, peak_resident, report
from lightning_moe.callbacks import ExpertPruning, ExpertUsageMonitor, RouterRebalance
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts

GOAL = 1.0
CALLBACKS_GOAL = 1.03
WARMUP = 2


class StepTimer(Callback):
    """Seconds of each step, all callbacks of the step included: from one batch's end to the next one's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    @property
    def mean(self) -> float:
        """Not the median, which would hide what happens at every second step."""
        return statistics.fmean(self.seconds[WARMUP:])


def prepared(setting: tuple[int, int, int], pruned: bool) -> MoECausalLM:
    network = random_model(*setting).train()
    if pruned:
        keep_experts(network, {layer.name: list(range(0, setting[0], 2)) for layer in find_moe_layers(network)})
    return MoECausalLM(lr=1e-6).adopt(network)


def fit(module: MoECausalLM, steps: int, *callbacks: Callback) -> float:
    """The mean step."""
    timer = StepTimer()
    trainer = Trainer(
        max_steps=steps,
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=2,
        callbacks=[*callbacks, timer],
        **QUIET,
    )
    trainer.fit(module, DataLoader(batches(steps), batch_size=None))  # type: ignore[arg-type]
    return timer.mean


def guests() -> list[Callback]:
    """All that watches and mends the routers between two rounds, and a pruning whose next round is far."""
    calibration = batches(1)
    return [
        ExpertPruning(calibration, rounds=1, start=10**6, cosine=False),
        RouterRebalance(load_balance=0.01, z_loss=0.001),
        ExpertUsageMonitor(every_n_steps=2),
    ]


def peak_bytes(setting: str, side: str) -> int:
    """Most memory of a whole process that loads a model and tunes it for three steps."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.finetune", setting, side], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def measure_peak(setting: str, side: str) -> None:
    """Print the bytes above those of a process that has only imported everything."""
    before = peak_resident()
    fit(prepared(SETTINGS[setting], side == "pruned"), 3)
    print(peak_resident() - before)


def in_turn(turn: int, ours: Callable[[], float], floor: Callable[[], float]) -> tuple[float, float]:
    """Both figures; who goes first alternates."""
    if turn % 2:
        return ours(), floor()
    second = floor()
    return ours(), second


def main(repeats: int = 5) -> None:
    """Whole fits in turn, so that drift of the machine's speed cancels; the slower, and larger, of the settings."""
    steps = WARMUP + min(2 * repeats, 8)
    pruned, memory, watched = [], [], []
    for name, setting in SETTINGS.items():
        whole, half = prepared(setting, pruned=False), prepared(setting, pruned=True)
        pairs: list[tuple[float, float]] = []
        guest_pairs: list[tuple[float, float]] = []
        for turn in range(repeats):
            pairs.append(in_turn(turn, partial(fit, half, steps), partial(fit, whole, steps)))
            guest_pairs.append(in_turn(turn, partial(fit, half, steps, *guests()), partial(fit, half, steps)))
        pruned.append(statistics.median(one / other for one, other in pairs))
        watched.append(statistics.median(one / other for one, other in guest_pairs))
        memory.append(peak_bytes(name, "pruned") / peak_bytes(name, "whole"))
    report("finetune-pruned", max(pruned), GOAL)
    report("finetune-pruned-memory", max(memory), GOAL)
    report("finetune-callbacks", max(watched), CALLBACKS_GOAL)


if __name__ == "__main__":
    torch.manual_seed(0)
    measure_peak(*sys.argv[1:]) if len(sys.argv) > 1 else main()
