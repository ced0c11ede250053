"""fsdp-*: what ``moe_fsdp`` costs and saves on two CPU processes.

``fsdp-load-peak`` is the memory that loading takes on each rank, at its peak, over its share of the model's bytes.
``fsdp-overhead`` is a training step through Lightning and ``moe_fsdp`` over one of a hand-written loop on plain
``fully_shard``. ``fsdp-finetune`` and ``fsdp-search`` are a step on two processes over one on a single process with two
threads, at the same global batch; ``-memory`` the memory of a rank over that of the single process, in a run of its own
where the allocator gives back what is freed: else what glibc keeps of gathered layers is half of what is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoConfig

from benchmarks.finetune import WARMUP, StepTimer
from benchmarks.ratios import QUIET, report, seconds_of
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import new_model, save_model
from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.strategies import MoEFSDPStrategy

LOAD_GOAL, OVERHEAD_GOAL, STEP_GOAL, MEMORY_GOAL = 1.5, 1.05, 1.0, 0.65
RANKS, WINDOWS, LENGTH = 2, 4, 256
"""Processes; windows of a step over all of them, and tokens of a window."""


class AnonymousMemory:
    """Most memory of this process that is not mapped from files, in bytes, sampled every few milliseconds."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def _watch(self) -> None:
        while not self._stop.wait(0.003):
            self.peak = max(self.peak, self.now())

    @contextmanager
    def above(self) -> Iterator[AnonymousMemory]:
        """Inside the context ``peak`` is that above what was held at its start."""
        before = self.now()
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()
            self.peak = max(self.peak, self.now()) - before


def config(layers: int, width: int) -> Any:
    return AutoConfig.for_model(
        "mixtral",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
    )


def batches(count: int, ranks: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """This rank's share of the same windows, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (count, WINDOWS, LENGTH), generator=generator)[:, rank::ranks]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def fit(module: LightningModule, steps: int, strategy: Any) -> StepTimer:
    timer = StepTimer()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        devices=ranks,
        strategy=strategy,
        max_steps=steps,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[timer],
        **QUIET,
    )
    trainer.fit(module, DataLoader(batches(steps, ranks, rank), batch_size=None))  # type: ignore[arg-type]
    return timer


def load_peak(folder: Path) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    sharding = Sharding(init_device_mesh("cpu", (RANKS,)))
    load_sharded(str(folder / "tiny"), sharding)  # what the first load of a process imports and keeps is no matter
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    with AnonymousMemory().above() as memory:
        load_sharded(str(folder / "model"), sharding)
    return {"ratio": memory.peak / (size / RANKS)}


def overhead(folder: Path) -> dict[str, Any]:
    """Both in the same processes, in turn."""
    repeats, steps = int(os.environ["REPEATS"]), WARMUP + 6
    pairs = []
    for _ in range(repeats):
        module = MoECausalLM(path=str(folder / "small"), lr=1e-6)
        ours = statistics.median(fit(module, steps, MoEFSDPStrategy()).seconds[WARMUP:])
        pairs.append((ours, statistics.median(by_hand(folder, steps)[WARMUP:])))
    return {"ratio": statistics.median(one / other for one, other in pairs)}


def by_hand(folder: Path, steps: int) -> list[float]:
    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    model = new_model(config(12, 448), torch.float32).train()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(batch: dict[str, torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()

    return [seconds_of(lambda batch=batch: step(batch)) for batch in batches(steps, RANKS, rank)]  # type: ignore[misc]


def one_step(folder: Path) -> dict[str, Any]:
    """A fine-tune or search step, and the memory of a whole process, by the number of ranks it finds."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    module: LightningModule = MoECausalLM(path=str(folder / "small"), lr=1e-6)
    if os.environ["JOB"] == "search":
        module = DiEPSearch(module, updates=100)  # type: ignore[arg-type]
    with AnonymousMemory().above() as memory:
        timer = fit(module, WARMUP + 6, MoEFSDPStrategy() if ranks > 1 else "auto")
    return {"seconds": statistics.median(timer.seconds[WARMUP:]), "bytes": memory.peak}


JOBS = {"load_peak": load_peak, "overhead": overhead, "one_step": one_step}


def run(name: str, folder: Path, ranks: int, **environment: str) -> list[dict[str, Any]]:
    """What each rank of a job says."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    threads = {"OMP_NUM_THREADS": str(RANKS // ranks)}
    subprocess.run(
        [sys.executable, *torchrun, "-m", "benchmarks.fsdp", name, str(folder)],
        env=os.environ | threads | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]


def main(repeats: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, settings in (("tiny", (2, 64)), ("small", (12, 448)), ("model", (16, 1536))):
            save_model(new_model(config(*settings), torch.float32), folder / model)
        report("fsdp-load-peak", max(one["ratio"] for one in run("load_peak", folder, RANKS)), LOAD_GOAL)
        found = run("overhead", folder, RANKS, REPEATS=str(repeats))
        report("fsdp-overhead", max(one["ratio"] for one in found), OVERHEAD_GOAL)
        for job in ("finetune", "search"):
            seconds = statistics.median(over_one(folder, "seconds", JOB=job) for _ in range(repeats))
            report(f"fsdp-{job}", seconds, STEP_GOAL)
            memory = over_one(folder, "bytes", JOB=job, MALLOC_MMAP_THRESHOLD_=str(10**6))
            report(f"fsdp-{job}-memory", memory, MEMORY_GOAL)


def over_one(folder: Path, what: str, **environment: str) -> float:
    """What a step takes on the rank where it takes most, over what it takes on a single process."""
    (alone,), several = (run("one_step", folder, ranks, **environment) for ranks in (1, RANKS))
    return float(max(one[what] for one in several) / alone[what])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        job, place = sys.argv[1], Path(sys.argv[2])
        result = JOBS[job](place)
        (place / f"{job}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
    else:
        main()
