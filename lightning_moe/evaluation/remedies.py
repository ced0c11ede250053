"""Remedies: what to change about a job that does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from lightning_moe.errors import InputError
from lightning_moe.evaluation.job_memory import JobMemories
from lightning_moe.evaluation.job_setup import FORWARD, Job, Setup, tunes

PER_NODE = 8
"""Devices on a node before another node is asked for."""

MOST_DEVICES = 1024

RATIOS = (0.5, 0.625, 0.75, 0.875)
"""Shares of the experts to drop before tuning."""

LEAST_SUMS = 0.125
"""GiB of gradients' sums below which one layer at a time is what there is."""

Change = Callable[[Setup], Setup]


@dataclass(frozen=True)
class Remedy:
    """A change, in words, and the bytes that a rank then takes at most."""

    change: str
    total: int


def remedies(memories: JobMemories, job: Job, setup: Setup, usable: int) -> list[Remedy]:
    """Changes each of which alone makes the job fit into ``usable`` bytes.

    If none does, one remedy: as many changes together as it takes, more devices last; or none where all of them are not
    enough.
    """

    def tried(words: str, changed: Setup, as_job: Job = job) -> Iterator[Remedy]:
        """A remedy, if it is one; what a job refuses is none."""
        try:
            total = memories.estimate(as_job, changed).fullest.total
        except InputError:
            return
        if total <= usable:
            yield Remedy(words, total)

    def first(variants: Iterable[tuple[str, Setup]]) -> list[Remedy]:
        return next(([one] for words, changed in variants for one in tried(words, changed)), [])

    found = [one for words, change in _free_changes(job, setup) for one in tried(words, change(setup))]
    found += first(_fewer_sums(job, setup))
    found += first(_smaller_batches(setup))
    if job == "tune all":
        found += tried("--recovery.train routers+norms", setup, "tune routers+norms")
    if tunes(job):
        ratios = (ratio for ratio in RATIOS if ratio > setup.ratio)
        found += first((f"tuning at a ratio of {ratio:g}", replace(setup, ratio=ratio)) for ratio in ratios)
    found += first(_more_devices(setup))
    if found:
        return found
    return first(_together(job, setup))


def _together(job: Job, setup: Setup) -> Iterator[tuple[str, Setup]]:
    """The changes that are free, one more at a time, then fewer sums, smaller batches, and more devices besides."""
    words: list[str] = []
    while free := next(_free_changes(job, setup), None):  # one may open the way to others
        words.append(free[0])
        setup = free[1](setup)
        yield " and ".join(words), setup
    fewest: tuple[str, Setup] | None = None
    for fewest in _fewer_sums(job, setup):
        yield " and ".join([*words, fewest[0]]), fewest[1]
    if fewest is not None:
        words.append(fewest[0])
        setup = fewest[1]
    for more, changed in _smaller_batches(setup):
        yield " and ".join([*words, more]), changed
    if setup.windows > 1:
        words.append("--data.batch_size 1")
    for more, changed in _more_devices(replace(setup, windows=1)):
        yield " and ".join([*words, more]), changed


def _free_changes(job: Job, setup: Setup) -> Iterator[tuple[str, Change]]:
    """Changes that cost time or rounding alone, in words, the cheapest first."""
    split = setup.strategy == "moe_fsdp"
    if not split and setup.ranks > 1 and setup.precision in ("32-true", "bf16-mixed", "bf16-true"):
        yield "--trainer.strategy moe_fsdp", lambda one: replace(one, strategy="moe_fsdp")
    if job not in FORWARD and not setup.recompute:
        words = "moe_fsdp's activation_checkpointing" if split else "--model.gradient_checkpointing true"
        yield words, lambda one: replace(one, recompute=True)
    if split and setup.precision == "32-true":
        yield "--trainer.precision bf16-mixed", lambda one: replace(one, precision="bf16-mixed")
    if split and setup.gpu and not setup.cpu_offload:
        yield "moe_fsdp's cpu_offload", lambda one: replace(one, cpu_offload=True)
    if split and not tunes(job) and job != "gradients" and setup.quantize is None:
        yield "moe_fsdp's quantize nf4", lambda one: replace(one, quantize="nf4")


def _fewer_sums(job: Job, setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Half as many gradients at once, and half again: more passes over the text."""
    memory = setup.gradient_memory
    while job == "gradients" and memory > LEAST_SUMS:
        memory /= 2
        yield f"--model.gradient_memory {memory:g}", replace(setup, gradient_memory=memory)


def _smaller_batches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Half as many windows, and half again, down to one."""
    windows = setup.windows
    while windows > 1:
        windows //= 2
        yield f"--data.batch_size {windows}", replace(setup, windows=windows)


def _more_devices(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Twice as many, and twice again, of which only a split model has something."""
    devices, nodes = setup.devices, setup.nodes
    while setup.strategy == "moe_fsdp" and 2 * devices * nodes <= MOST_DEVICES:
        devices, nodes = (2 * devices, nodes) if 2 * devices <= PER_NODE else (devices, 2 * nodes)
        yield f"{devices * nodes} devices ({nodes} x {devices})", replace(setup, devices=devices, nodes=nodes)
