"""Devices: what one can hold and do, as its maker says, or as it is found here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from lightning_moe.errors import InputError

GiB = 1 << 30

UTILISATION = 0.35
"""Share of its peak that a device reaches in a large model; with small batches and narrow experts it is less."""

OF_PRODUCTS = 0.7
"""Share of what a CPU does in one large product that it reaches in a model: ``evaluate`` reached 0.7 to 0.8."""

LINK = 20e9
"""Bytes per second that a GPU gets from others of its node in an all-gather, where there is no NVLink."""

BETWEEN_NODES = 25e9
"""Bytes per second that a GPU gets from other nodes: a network card of 200 Gbit/s for each."""

ON_CPU = 1e9
"""Bytes per second that a process gets from another one of its machine, by gloo."""

READING = 2e9
"""Bytes of a checkpoint that a node reads per second, from a fast disk."""


@dataclass(frozen=True)
class Device:
    """What one device can hold and do."""

    name: str
    memory: int
    """Bytes."""
    half: float | None = None
    """Operations per second in 16 bits, as they come in practice; None where nobody knows."""
    single: float | None = None
    """The same in float32, which torch by default does without tensor cores."""
    link: float = LINK
    """Bytes per second that it gets from others of its node in an all-gather."""
    gpu: bool = True


def _gpu(name: str, memory: int, half: float, single: float, link: float = LINK) -> Device:
    """Memory in GiB, the makers' peaks (dense) in 1e12 operations per second."""
    return Device(name, memory * GiB, half * 1e12 * UTILISATION, single * 1e12 * UTILISATION, link)


GPUS = (
    _gpu("B200", 180, 2250, 75, 600e9),
    _gpu("H200", 141, 989, 67, 300e9),
    _gpu("H100", 80, 989, 67, 300e9),
    _gpu("MI300X", 192, 1307, 163, 250e9),
    _gpu("A100-80GB", 80, 312, 19.5, 200e9),
    _gpu("A100-40GB", 40, 312, 19.5, 200e9),
    _gpu("L40S", 48, 362, 91),
    _gpu("A10", 24, 125, 31),
    _gpu("L4", 24, 121, 30),
    _gpu("V100", 32, 125, 15.7, 100e9),
    _gpu("T4", 16, 65, 8.1),
    _gpu("RTX 4090", 24, 165, 83),
)


ALIASES = {"gh200": "h200", "gb200": "b200", "a10g": "a10"}
"""Words of drivers' names for what is known under another one."""


def known_gpu(name: str) -> Device:
    """By its name, be it words of a longer one, as drivers give it. Raises ``InputError``."""
    asked = {ALIASES.get(word, word) for word in _words(name)}
    if "a100" in asked and "80gb" not in asked:
        asked.add("40gb")  # the smaller one, where no size is said
    for one in GPUS:
        if asked >= _words(one.name) or "".join(one.name.split()).lower() == name.lower():
            return one
    raise InputError(
        f"--gpu {name}: not known. Known: {', '.join(one.name for one in GPUS)}; for others give --device_memory "
        "and --flops."
    )


def _words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split())


def this_gpu() -> Device | None:
    """The GPU of this machine, if it has one."""
    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    try:
        known = known_gpu(name)
    except InputError:
        return Device(name, memory)
    return Device(known.name, memory, known.half, known.single, known.link)


def this_cpu(processes: int) -> Device:
    """This machine's share for each of so many processes, its speed measured by a product of matrices."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    speed = measured_speed() * OF_PRODUCTS
    return Device("CPU", memory // processes, speed, speed, ON_CPU, gpu=False)


def measured_speed(size: int = 768, seconds: float = 0.3) -> float:
    """Operations per second of this process in a product of float32 matrices."""
    matrix = torch.ones(size, size)
    _ = matrix @ matrix
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        _ = matrix @ matrix
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)
