"""Tensors that may be split over ranks, as FSDP2 splits them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_split(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are split over ranks."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole; of a split one every rank must ask, and each gets it, where the model computes."""
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    # Offloaded ones come first: NCCL gathers nothing in the CPU's memory.
    there: DTensor = tensor if tensor.device.type == device else tensor.to(device)  # type: ignore[assignment]
    return there.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def put(values: Tensor, tensor: Tensor) -> None:
    """Write ``values``, which every rank has as a whole, into a tensor that may be split."""
    if isinstance(tensor, DTensor):  # no rank is asked for its values: all have the same
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local(tensor).copy_(local(values))
