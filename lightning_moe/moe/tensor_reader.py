"""Tensor reader: any tensor of a checkpoint by name, whichever of its files it lies in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_moe.errors import InputError, first_line
from lightning_moe.moe.checkpoints import all_finite


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, to read tensor by tensor. Raises ``InputError`` when it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({first_line(error)}).") from error


class TensorReader:
    """The tensors of several open files as one. Raises ``InputError`` for what is missing or not finite."""

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._files = files
        parts = [stack.enter_context(opened(file)) for file in files]
        self._holders = {name: tensors for tensors in parts for name in tensors.keys()}  # noqa: SIM118 - not a dict

    @property
    def names(self) -> list[str]:
        return list(self._holders)

    def tensor(self, name: str) -> Tensor:
        return finite(name, self._holder(name).get_tensor(name))

    def row(self, name: str, place: int) -> Tensor:
        """One place of the first dimension of a tensor; the rest is not read."""
        return finite(name, self._holder(name).get_slice(name)[place])

    def _holder(self, name: str) -> Any:
        if name not in self._holders:
            raise InputError(f"{self._files[0].parent}: no {name} in its weight files; the checkpoint is incomplete.")
        return self._holders[name]


@contextmanager
def tensor_reader(files: Sequence[Path]) -> Iterator[TensorReader]:
    with ExitStack() as stack:
        yield TensorReader(files, stack)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or ``InputError`` when it holds values that are not finite."""
    # float8 and packed integers know no isfinite; their scales do.
    if tensor.is_floating_point() and tensor.element_size() > 1 and not all_finite(tensor):
        raise InputError(f"{name} holds values that are not finite; the checkpoint is damaged.")
    return tensor
