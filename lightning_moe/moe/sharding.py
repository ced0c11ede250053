"""Sharding: split a model over ranks with FSDP2, by what discovery finds in it."""

# E experts

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register
from torch.distributed.tensor import Shard
from transformers import PreTrainedModel

from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.decoding import DECODE, decoder_method
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.split_tensors import is_split


@dataclass(frozen=True)
class Sharding:
    """How a model is split.

    Each decoder layer is gathered for its forward and again for its backward; all else (embedding, last norm, head) for
    the forward of the whole model and again for its backward. Stacks of experts are split over the experts where their
    number allows, else along another dimension that divides, so that no rank holds less than another. Routers, norms
    and biases are on every rank as a whole: pruning and rebalancing change them in place, and they weigh nothing.

    Args:
        mesh: Of one dimension, or of two: replicas, and the ranks that a replica is split over.
        gathered: Type in which decoder layers are gathered; None is that of their weights.
        offload: Whether what is split lies in the CPU's memory.
    """

    mesh: DeviceMesh
    gathered: torch.dtype | None = None
    offload: bool = False

    @property
    def ranks(self) -> int:
        """The ranks that one copy of the model is split over."""
        return self.mesh.size(-1)

    def shard_layer(self, layer: nn.Module, routers: Iterable[nn.Module]) -> None:
        """Split one decoder layer; ``routers`` are those of the whole model."""
        self._shard(layer, routers, MixedPrecisionPolicy(self.gathered, torch.float32, cast_forward_inputs=False))

    def shard_rest(self, model: PreTrainedModel, routers: Iterable[nn.Module]) -> None:
        """Split what is left when the decoder layers are split; in mixed precision it is gathered as it is."""
        self._shard(model, routers, MixedPrecisionPolicy(cast_forward_inputs=False))
        setattr(model, DECODE, decoder_method(model))
        register(model, DECODE)

    def shard(self, model: PreTrainedModel) -> None:
        """Split a model that lies in memory as a whole."""
        routers = [layer.router for layer in find_moe_layers(model)]
        for layer in decoder_layers(model):
            self.shard_layer(layer, routers)
        self.shard_rest(model, routers)

    def _shard(self, module: nn.Module, routers: Iterable[nn.Module], precision: MixedPrecisionPolicy) -> None:
        own = {parameter for parameter in module.parameters() if not is_split(parameter)}
        plain = {parameter for router in routers for parameter in router.parameters()} & own
        plain |= {parameter for parameter in own if parameter.dim() < 2}
        for parameter in plain:
            parameter.data = parameter.data.to(self.mesh.device_type)
        pinned = self.mesh.device_type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy()
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=True,  # the last part too: while gathered it would show other parameters
            shard_placement_fn=self._placement,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=plain,
        )

    def _placement(self, parameter: nn.Parameter) -> Shard | None:
        """Along the first dimension that divides evenly, for FSDP2 splits no other dimension unevenly."""
        even = (place for place, size in enumerate(parameter.shape) if size % self.ranks == 0)
        return Shard(next(even, 0))


def make_mesh(device_type: str, ranks: int, replicas: int = 1) -> DeviceMesh:
    """The mesh of ``Sharding`` over all ranks, of which each replica has the next ``ranks / replicas``."""
    if replicas == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("ranks",))
    return init_device_mesh(device_type, (replicas, ranks // replicas), mesh_dim_names=("replicas", "ranks"))


@contextmanager
def gathered_weights(layer: nn.Module) -> Iterator[None]:
    """Have the weights of a decoder layer together inside the context, where it is split; all ranks must enter it.

    The model must have run before.
    """
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
