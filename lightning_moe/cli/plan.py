"""``plan``: what each job takes in memory and time on devices that need not be here, before anything is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig

from lightning_moe.cli.cluster import Cluster
from lightning_moe.cli.round_options import HALF_PRECISION
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.search import SearchRequest
from lightning_moe.data.datamodule import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.evaluation import device as devices
from lightning_moe.evaluation.device import Device, known_gpu, this_cpu, this_gpu
from lightning_moe.evaluation.disk_jobs import DiskJob, cutting, thinning
from lightning_moe.evaluation.job_memory import JobMemories
from lightning_moe.evaluation.job_passages import note_on
from lightning_moe.evaluation.job_setup import JOBS, Job, Setup, tunes
from lightning_moe.evaluation.job_time import job_time
from lightning_moe.evaluation.remedies import remedies
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.lone_config import lone_config
from lightning_moe.moe.semi_structured import check_widths
from lightning_moe.moe.weights import Weight, active_parameters, total_parameters

USABLE = 0.9
"""Share of a device's memory that an estimate may fill: the rest is the allocator's and the libraries'."""


@dataclass(frozen=True)
class PlanRequest:
    """What ``plan`` is asked, beside model, text and devices."""

    ratio: float = 0.5
    updates: int | None = None
    finetune_tokens: int = 1_000_000
    gpu: str | None = None
    device_memory: float | None = None
    """GiB."""
    flops: float | None = None
    """Per second."""

    def check(self) -> None:
        """Raise ``InputError`` for what cannot be."""
        for name in ("updates", "finetune_tokens", "device_memory", "flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value}: above 0.")


def plan(
    cluster: Cluster, model: MoECausalLM, data: TextDataModule, request: PlanRequest, out: str | None, overwrite: bool
) -> dict[str, Any]:
    """The figures of every job; with ``out`` they are written to estimate.json, too."""
    request.check()
    make_config = _config_maker(model)
    stored = make_config().dtype or torch.float32
    setup = _setup(cluster, model, data, request, make_config())
    search = SearchRequest(0.5).arguments
    tokens = _tokens(data, setup, request, search)
    where = _device(cluster, request)
    setup = replace(setup, gpu=where.gpu)
    config_digest = hashlib.sha256(make_config().to_json_string().encode()).hexdigest()[:12]
    asked = {"model.path": model.path, "config": config_digest, **asdict(request)}
    asked |= {name: str(value) for name, value in asdict(setup).items()} | {"device": where.name}
    run = None if out is None else RunFolder(out, "estimate", asked, overwrite)
    memories = JobMemories(make_config, search)
    memories.keep(request.ratio)  # an impossible one is refused before any work
    weights = memories.whole.weights
    usable = int(USABLE * where.memory)
    jobs = {job: _figures(memories, job, setup, where, usable, tokens[job]) for job in JOBS}
    results = {
        "model": model.path or f"a new {make_config().model_type}",
        "parameters": total_parameters(weights),
        "active_parameters": active_parameters(weights),
        "devices": f"{setup.nodes} x {setup.devices} x {where.name}",
        "strategy": setup.strategy,
        "precision": setup.precision,
        "batch": f"{setup.windows} x {setup.seq_len} tokens on each rank",
        "memory": where.memory,
        "usable": usable,
        "jobs": jobs
        | {
            "prune": _on_disk(lambda: cutting(weights, request.ratio, stored)),
            "2:4": _on_disk(lambda: _thinning(memories, stored)),
        },
        "assumed": _assumed(where, weights, setup),
    }
    return {"command": "estimate", **results} if run is None else run.finish(results)


def _config_maker(model: MoECausalLM) -> Callable[[], Any]:
    """Makes the model's config: that at its path, or that of a new one."""
    path, settings = model.path, model.config
    if path is not None:
        return lambda: lone_config(path)
    if settings is None or "model_type" not in settings:
        raise InputError("no model: give --model.path a folder, a config.json or a hub id.")
    others = {name: value for name, value in settings.items() if name != "model_type"}
    return lambda: AutoConfig.for_model(settings["model_type"], **others)


def _setup(cluster: Cluster, model: MoECausalLM, data: TextDataModule, request: PlanRequest, config: Any) -> Setup:
    loaded = config.dtype or torch.float32
    dtype = loaded if model.dtype_name == "auto" else getattr(torch, model.dtype_name)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if data.seq_len is not None and limit is not None and data.seq_len > limit:
        raise InputError(f"--data.seq_len {data.seq_len}: the model takes at most {limit} tokens.")
    setup = Setup(
        devices=cluster.devices,
        nodes=cluster.nodes,
        strategy=cluster.strategy,
        recompute=model.gradient_checkpointing,
        precision=cluster.precision,
        dtype=dtype,
        # As prepare_tuning has it: what is stored in 16 bits is tuned in 32.
        tuned_dtype=torch.float32 if model.dtype_name == "auto" and dtype in HALF_PRECISION else dtype,
        windows=data.batch_size,
        seq_len=data.seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN),
        ratio=request.ratio,
        gradient_memory=model.gradient_memory,
    )
    split = cluster.split
    if split is None:
        return setup
    return replace(
        setup,
        replicas=split.replicas,
        recompute=setup.recompute or split.activation_checkpointing,
        cpu_offload=split.cpu_offload,
        quantize=split.quantize,
    )


def _tokens(data: TextDataModule, setup: Setup, request: PlanRequest, search: Mapping[str, Any]) -> dict[Job, int]:
    """The tokens of each job's text, over all ranks."""
    if data.samples == "all":
        raise InputError("--data.samples all: a plan reads no text; give the number of windows.")
    observed = (data.samples or DEFAULT_SAMPLES) * setup.seq_len
    batches = (request.updates or search["updates"]) * search["accumulate"]
    searched = batches * setup.ranks * setup.windows * setup.seq_len
    return {job: request.finetune_tokens if tunes(job) else searched if job == "search" else observed for job in JOBS}


def _device(cluster: Cluster, request: PlanRequest) -> Device:
    """What the ranks compute on: as asked, else as it is here."""
    found: Device | None
    if request.gpu is not None:
        if cluster.accelerator == "cpu":
            raise InputError(f"--gpu {request.gpu}: not with --trainer.accelerator cpu; leave one out.")
        found = known_gpu(request.gpu)
    elif cluster.accelerator == "cpu":
        found = this_cpu(cluster.devices)
    else:
        found = this_gpu()
        if found is None and request.device_memory is not None:
            found = Device("GPU", 0)
        elif found is None and cluster.accelerator == "gpu":
            raise InputError("no GPU is here to ask; give --gpu (as H100) or --device_memory in GiB.")
        found = found or this_cpu(cluster.devices)
    if request.device_memory is not None:
        memory = int(request.device_memory * devices.GiB)
        found = replace(found, memory=memory, name=f"{found.name} of {request.device_memory:g} GiB")
    return found if request.flops is None else replace(found, half=request.flops, single=request.flops)


def _figures(memories: JobMemories, job: Job, setup: Setup, where: Device, usable: int, tokens: int) -> dict[str, Any]:
    """What one job takes, whether it fits, and what would make it fit."""
    try:
        memory = memories.estimate(job, setup)
    except InputError as error:
        return {"refused": str(error)}
    fullest = memory.fullest
    weights = memories.weights(job, setup)
    time = job_time(weights, memories.shapes, job, setup, where, tokens)
    fits, note = fullest.total <= usable, note_on(job, setup, memories.whole.weights, memories.shapes)
    return {
        "bytes": fullest.total,
        **asdict(fullest),
        "host": memory.host,
        "fits": fits,
        "remedies": [] if fits else [asdict(one) for one in remedies(memories, job, setup, usable)],
        "tokens": tokens,
        "seconds": None if time is None else round(time.seconds, 1),
        "moving_seconds": None if time is None else round(time.moving, 1),
        **({} if note is None else {"note": note}),
    }


def _on_disk(work: Callable[[], DiskJob]) -> dict[str, Any]:
    """What a job takes that goes from file to file, and nothing on devices."""
    try:
        found = work()
    except InputError as error:
        return {"refused": str(error)}
    return {"bytes": 0, "host": found.host, "fits": True, "seconds": round(found.seconds, 1)}


def _thinning(memories: JobMemories, stored: torch.dtype) -> DiskJob:
    check_widths(memories.whole.moe_layers)
    return thinning(memories.whole.weights, stored)


def _assumed(where: Device, weights: list[Weight], setup: Setup) -> dict[str, Any]:
    """What the times rest on."""
    return {
        "operations_per_second": {"16 bits": where.half, "32 bits": where.single},
        "bytes_per_second": {"in a node": where.link, "between nodes": devices.BETWEEN_NODES, "disk": devices.READING},
        "loading_seconds": round(total_parameters(weights) * setup.dtype.itemsize / devices.READING, 1),
    }
