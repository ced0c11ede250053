"""moe_fsdp: FSDP2 that knows experts, as a strategy of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.errors import UNREADABLE, InputError, describe, first_line
from lightning_moe.files import put_back, put_in_place, remove
from lightning_moe.moe.checkpoints import model_id
from lightning_moe.moe.experts import IMPLEMENTATION
from lightning_moe.moe.layers import find_moe_layers, hugging_face_models
from lightning_moe.moe.non_uniform import find_blocks
from lightning_moe.moe.quantisation import Quantisation, check_quantisation, quantise_experts
from lightning_moe.moe.ranks import average_gradients, check_same, on_all_ranks
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding, make_mesh
from lightning_moe.moe.split_tensors import is_sharded, is_split, local

PRECISIONS: Mapping[str, torch.dtype | None] = {
    "32-true": None,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": None,
}
"""Precisions it works in, and what decoder layers are gathered in where that is not the type of their weights."""


class MoEFSDPStrategy(ModelParallelStrategy):
    """Split each Hugging Face MoE inside a LightningModule over all ranks, by FSDP2; ``moe_fsdp`` to the Trainer.

    What is split and how, ``Sharding`` says. ``MoECausalLM`` loads its part of a checkpoint straight into the split
    model; those of another module, made in its ``configure_model``, are split where they lie, and dense models beside
    them are left whole. Parameters that are not split, of whoever (routers, importance logits), stay identical on all
    ranks: their gradients are averaged after each backward pass, before ``on_after_backward`` sees them. The module may
    be fitted by hand or by Lightning, with any number of optimisers.

    Args:
        replicas: Copies of the model, each split over its share of the ranks (HSDP); one per node spares the network
            between them.
        activation_checkpointing: Compute each decoder layer's activations anew in the backward pass.
        cpu_offload: Keep weights, gradients and the optimiser's state in the CPU's memory.
        quantize: Hold the experts of a frozen model in 4 bits (nf4) or 8 (int8): for all that does not tune.
        save_distributed_checkpoint: Each rank writes its part of a checkpoint, a folder; otherwise rank 0 gathers it
            as a whole into one file (which Lightning cannot resume when the optimiser has no state, as plain SGD).
        process_group_backend: Of torch.distributed; default nccl for GPUs, gloo for CPUs.
        timeout: After which a rank that waits for another gives up.
    """

    def __init__(
        self,
        replicas: int = 1,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        quantize: Quantisation | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        if replicas < 1:
            raise InputError(f"moe_fsdp: replicas {replicas}: at least 1.")
        check_quantisation(quantize)
        if cpu_offload and not save_distributed_checkpoint:
            raise InputError(
                "moe_fsdp: cpu_offload goes with save_distributed_checkpoint true; torch resumes no other."
            )
        self.replicas, self.activation_checkpointing, self.cpu_offload = replicas, activation_checkpointing, cpu_offload
        self.quantize = quantize
        self._sharding: Sharding | None = None

    @property
    def sharding(self) -> Sharding:
        """How models are split; there once the ranks know each other."""
        assert self._sharding is not None, "setup_environment has not run"
        return self._sharding

    def begin(self, module: LightningModule) -> None:
        """Start all ranks and let them know each other, before a loop of the Trainer does."""
        launcher = self.launcher
        if launcher is not None:
            launcher.launch(lambda: None)
        self.connect(module)
        self.setup_environment()

    @override
    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if world % self.replicas:
            raise InputError(f"moe_fsdp: {world} ranks are not divisible into {self.replicas} replicas.")
        precision = str(self.precision_plugin.precision)
        if precision not in PRECISIONS:
            raise InputError(f"--trainer.precision {precision}: moe_fsdp works in {', '.join(PRECISIONS)}.")
        self._data_parallel_size = world
        super().setup_environment()
        if self._sharding is None:
            mesh = make_mesh(self.root_device.type, world, self.replicas)
            self._sharding = Sharding(mesh, PRECISIONS[precision], self.cpu_offload)

    def load_split(self, path: str, dtype: str = "auto") -> PreTrainedModel:
        """Load a checkpoint, each rank its part; every rank must call it. Raises ``InputError``."""
        check_same(f"--model.path {path}", on_all_ranks(lambda: model_id(path)))
        kind = self.quantize
        prepare = None if kind is None else lambda layer: quantise_experts(layer, kind)
        network = on_all_ranks(lambda: load_sharded(path, self.sharding, dtype, prepare))
        if kind is not None:
            network.set_experts_implementation(IMPLEMENTATION)  # the only one that unpacks
        return network

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        networks = hugging_face_models(module)
        moes = [network for network in networks if any(find_blocks(network))]
        if networks and not moes:
            find_moe_layers(networks[0])  # refuses it
        for network in moes:
            self._prepare(network)
        for loop in (
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
            trainer.fit_loop.epoch_loop.val_loop,
        ):
            loop.inference_mode = False  # weights gathered in it could not be gathered for training again
        self._share(parameter for parameter in module.parameters() if not is_split(parameter))
        super().setup(trainer)

    def _prepare(self, network: PreTrainedModel) -> None:
        if not is_sharded(network):
            self._share((*network.parameters(), *network.buffers()))
            self.sharding.shard(network)
        if self.activation_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})

    def _share(self, tensors: Iterable[Tensor]) -> None:
        """Put what rank 0 has in place of each tensor: random numbers may have made them differ."""
        for tensor in tensors:
            given = tensor.detach().to(self.root_device).contiguous()
            torch.distributed.broadcast(given, 0)
            tensor.data.copy_(given)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        # All but what is split, which stays where ``Sharding`` put it.
        assert isinstance(self.model, nn.Module)
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                if not is_split(parameter):
                    parameter.data = parameter.data.to(self.root_device)
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self.root_device)
            if isinstance(module, Metric):
                module.to(self.root_device)
            if isinstance(module, LightningModule):
                module._device = self.root_device

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if len({is_split(parameter) for parameter in group["params"]}) > 1:
                    group["foreach"] = group["fused"] = False  # which take one kind of tensor at a time

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        vars(self.precision_plugin).update(
            clip_grad_by_norm=self._clip_grad_by_norm,  # torch's own take no mixture of split and whole gradients
            clip_grad_by_value=self._clip_grad_by_value,
            post_backward=self._post_backward,
        )

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the norm over all ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        split, plain = (
            sum(
                (local(p.grad).float().square().sum() for p in parameters if is_split(p) == kind),
                start=torch.zeros((), device=self.root_device),
            )
            for kind in (True, False)
        )
        torch.distributed.all_reduce(split, group=self.sharding.mesh.get_group(self.sharding.mesh.ndim - 1))
        factor = (clip_val / ((split + plain).sqrt() + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))

    def _clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            local(parameter.grad).clamp_(-clip_val, clip_val)

    def _post_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:
        """Average the gradients of what is not split: of sums over batches too, for averaging again changes nothing."""
        average_gradients([p for p in module.parameters() if p.requires_grad and not is_split(p)])
        plugin = self.precision_plugin
        return type(plugin).post_backward(plugin, tensor, module)  # which calls on_after_backward

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Beside first, then renamed: a kill leaves no folder with parts of two moments."""
        target = Path(self.broadcast(filepath))
        beside = target.with_name(f".{target.name}.partial")
        if self.is_global_zero:
            remove(beside)  # of a save that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, beside, storage_options)
        self.barrier()
        if self.is_global_zero:
            put_in_place(beside, target)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if self.is_global_zero:
            put_back(path)
        self.barrier()  # or another rank might look for it before
        on_all_ranks(lambda: self._check_stored(path, weights_only))
        try:
            return super().load_checkpoint(path, weights_only)
        except CheckpointException as error:  # of all ranks together, and no Exception
            reason = describe(next(iter(error.failures.values()))[0])
            raise InputError(f"{path}: this checkpoint cannot be loaded: {reason}") from error
        except UNREADABLE as error:
            raise InputError(f"{path}: this checkpoint cannot be loaded: {describe(error)}") from error

    def _check_stored(self, path: Path, weights_only: bool | None) -> None:
        """Refuse the checkpoint of another model: torch would take a part of it, or say so on some ranks only."""
        if not path.exists():
            raise InputError(f"{path}: no such checkpoint.")
        try:
            stored = _stored_shapes(path, weights_only)
        except Exception as error:  # a pickle that is cut off fails in many ways
            raise InputError(f"{path}: no whole checkpoint ({first_line(error)}); was its saving killed?") from error
        assert isinstance(self.model, nn.Module) and self.lightning_module is not None
        here = {name: tuple(getattr(value, "shape", ())) for name, value in get_model_state_dict(self.model).items()}
        for name, shape in here.items():
            if stored.get(name, shape) != shape:
                raise InputError(
                    f"{path}: a checkpoint of another plan: {name} has shape {stored[name]} there and {shape} here; "
                    "go on with the model that it was made of."
                )
        other = sorted(here.keys() ^ stored.keys())
        if other and self.lightning_module.strict_loading:
            place = "here" if other[0] in here else "there"
            raise InputError(
                f"{path}: a checkpoint of another model: {other[0]} is only {place}, of {len(other)} tensors that are "
                "not in both; go on with the model that it was made of."
            )


def _stored_shapes(path: Path, weights_only: bool | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the module's tensors in a checkpoint of parts, a folder, or of one file."""
    if path.is_dir():
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
        own = {name: entry for name, entry in entries.items() if name.startswith("state_dict.")}
        return {name.removeprefix("state_dict."): tuple(getattr(entry, "size", ())) for name, entry in own.items()}
    tensors = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)["state_dict"]
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def check_strategy(strategy: Strategy | str | None) -> None:
    """Raise ``InputError`` for a strategy, or the name of one, that would not do what it seems to."""
    if isinstance(strategy, FSDPStrategy) or (isinstance(strategy, str) and strategy.startswith("fsdp")):
        raise InputError(
            "--trainer.strategy fsdp: Lightning allows no manual optimisation with FSDP1, which the search needs; give "
            "moe_fsdp, which is FSDP2."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, MoEFSDPStrategy):
        raise InputError(
            f"--trainer.strategy {type(strategy).__name__}: it leaves splitting to the module, and every rank would "
            "hold the whole model; give moe_fsdp."
        )


StrategyRegistry.register("moe_fsdp", MoEFSDPStrategy, description="FSDP2 that knows experts.")
