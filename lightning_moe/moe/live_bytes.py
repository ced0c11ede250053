"""LiveBytes: run a model on tensors without content, and count the bytes of all that it makes while they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

aten = torch.ops.aten


@contextmanager
def imagined(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Inside the context tensors have shape, type and device (CPU) but no content: any size costs nothing.

    Everything runs as it would, autocast and autograd too. Tensors of one context live on in another of its ``mode``.
    Transformers builds another attention mask for such tensors than for real ones, which is prevented here.
    """
    names = vars(masking_utils)
    stock = names["is_tracing"]
    names["is_tracing"] = lambda tensor=None: False
    try:
        with mode or FakeTensorMode() as entered:
            yield entered
    finally:
        names["is_tracing"] = stock


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside this context, as long as each lives.

    Views and results in place count once, as the storage they share. What only kernels see (scratch) is not there.

    Args:
        known: Tensors that are there before and do not count, such as weights.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once since ``begin``."""
        self._alive: dict[int, weakref.ref[Any] | None] = {}
        for tensor in known:
            self._alive[tensor.untyped_storage()._cdata] = None

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stand_in = STAND_INS.get(func)
        result = func(*args, **(kwargs or {})) if stand_in is None else stand_in(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The shape it has on devices; torch's own stand-in knows bfloat16 alone."""
    if left.dim() == 2 and right.dim() == 2:
        return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])
    return left.new_empty(left.shape[-2], right.shape[-1])


def _bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return values.new_empty(minlength)


def _content(tensor: Tensor) -> bool | int | float:
    """What code reads that asks a tensor for its content: yes, all of a mask are true."""
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.bincount.default: _bincount,
    aten._local_scalar_dense.default: _content,
}
"""For operations whose result's shape depends on content, or that torch has no stand-in for."""
