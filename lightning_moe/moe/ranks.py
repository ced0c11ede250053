"""Processes that work together on one job: who they are, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from lightning_moe.errors import InputError, describe

T = TypeVar("T")


def num_ranks() -> int:
    """Processes that work together; 1 where there are no others."""
    return torch.distributed.get_world_size() if _talking() else 1


def rank() -> int:
    """The number of this process among them."""
    return torch.distributed.get_rank() if _talking() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks; every rank must call it."""
    if num_ranks() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def average_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all ranks in place of each tensor. All ranks must call it, with tensors alike."""
    tensors = list(tensors)
    if num_ranks() == 1 or not tensors:
        return
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        alike = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        torch.distributed.all_reduce(flat)
        flat /= num_ranks()
        for tensor, mean in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Put the mean over all ranks in place of each gradient; one that a rank has not is zero there.

    All ranks must call it, with the same parameters. What has a gradient nowhere keeps none.
    """
    if num_ranks() == 1 or not parameters:
        return
    have = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    have = have.to(parameters[0].device)
    torch.distributed.all_reduce(have, torch.distributed.ReduceOp.MAX)
    learn = [parameter for parameter, somewhere in zip(parameters, have.tolist(), strict=True) if somewhere]
    for parameter in learn:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average_over_ranks(parameter.grad for parameter in learn if parameter.grad is not None)


def gathered(value: Any) -> list[Any]:
    """What each rank has to say, in their order; every rank must call it."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def check_same(what: str, value: Any) -> None:
    """Raise ``InputError`` on all ranks where they were not given the same."""
    values = gathered(value)
    other = next((number for number, one in enumerate(values) if one != values[0]), None)
    if other is not None:
        raise InputError(
            f"{what}: rank 0 has {values[0]}, rank {other} has {values[other]}; give all ranks the same, such as one "
            "folder that all nodes see."
        )


def check_shared(folder: Path) -> None:
    """Raise ``InputError`` on all ranks unless they see the same folder; it is made if it is not there."""
    if num_ranks() == 1:
        return
    file = folder / f".ranks-{gathered(uuid4().hex)[0]}"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            file.touch()

    on_all_ranks(write)
    seen = gathered(file.exists())
    if rank() == 0:
        file.unlink()
    if not all(seen):
        raise InputError(
            f"{folder}: rank {seen.index(False)} does not see what rank 0 writes there; give a folder that all nodes "
            "share."
        )


def on_all_ranks(work: Callable[[], T]) -> T:
    """What ``work`` gives; refused on all ranks where one of them fails, lest the others wait for that one."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    problems = gathered(None if failure is None else describe(failure))
    if failure is not None and not isinstance(failure, InputError):
        raise failure
    for number, one in enumerate(problems):
        if one is not None:
            raise InputError(one if all(problems) or number == 0 else f"rank {number}: {one}")
    return result  # type: ignore[return-value] # it has succeeded


def _talking() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
