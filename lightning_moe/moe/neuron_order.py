"""Neuron order: neurons of an expert may stand in any order, so experts are averaged in the order that fits best."""

# F neurons of an expert (its width), D all numbers of a neuron: its rows of gate and up, its column of down, its biases

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


@dataclass(frozen=True)
class NeuronAxis:
    """Where the neurons lie in one tensor of an expert."""

    place: tuple[str, int]
    """Name of the stack in the model, and which piece of it the tensor is: the order in which tensors are compared."""
    dimension: int
    parts: int = 1
    """Matrices that are fused along the dimension: 2 for gate and up."""
    interleaved: bool = False
    """Whether fused ones take turns, neuron by neuron, and do not follow each other."""

    def rows(self, tensor: Tensor) -> Tensor:
        """What the tensor holds of each neuron, ``(F, .)``, part after part: the same however it is stored."""
        rows = tensor.movedim(self.dimension, 0)
        width = rows.shape[0] // self.parts
        if self.interleaved:
            return rows.reshape(width, -1)
        return rows.reshape(self.parts, width, -1).transpose(0, 1).reshape(width, -1)

    def reordered(self, tensor: Tensor, order_F: Tensor) -> Tensor:
        """The tensor with neuron ``order_F[f]`` in place ``f``."""
        part = torch.arange(self.parts)
        turns, blocks = order_F[:, None] * self.parts + part, part[:, None] * len(order_F) + order_F
        index = turns if self.interleaved else blocks
        return tensor.index_select(self.dimension, index.flatten().to(tensor.device))


def axes_in_memory(experts: nn.Module) -> dict[str, NeuronAxis]:
    """The axes of an experts module's stacks, by name, each of one expert's slice; what has no neurons is left out."""
    axes = {}
    for name, stack in [*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False)]:
        into = not name.startswith("down")  # gate and up have a row per neuron, down has a column
        if stack.dim() == 3:
            dimension = int(into == bool(experts.is_transposed))
        elif stack.dim() == 2 and into:
            dimension = 0  # the bias of gate and up; that of down belongs to no neuron
        else:
            continue
        fused = name.startswith("gate_up")
        axes[name] = NeuronAxis((name, 0), dimension, 2 if fused else 1, fused and not experts.is_concatenated)
    return axes


def best_order(own_FD: Tensor, other_FD: Tensor) -> Tensor:
    """The order of the other expert's neurons in which it is nearest to ``own``, ``(F,)`` (M-SMoE, section 3.2).

    The assignment that maximises the sum of products of paired neurons, which is to minimise their squared distance.
    Both must be contiguous: the same numbers then give the same order, whatever tensors they were taken from.
    """
    likeness_FF = own_FD @ other_FD.T
    _, order = linear_sum_assignment(likeness_FF.numpy(), maximize=True)
    return torch.from_numpy(order)


class NeuronOrders:
    """The orders in which experts of one layer are averaged into kept ones, each found when it is first asked for.

    Two experts are held at a time.

    Args:
        axes: Of every tensor of an expert that has neurons, by name.
        read: Gives the tensor of that name of one expert.
    """

    def __init__(self, axes: Mapping[str, NeuronAxis], read: Callable[[str, int], Tensor]) -> None:
        self._axes = dict(sorted(axes.items(), key=lambda item: item[1].place))
        self._read = read
        self._orders: dict[tuple[int, int], Tensor] = {}

    def reordered(self, name: str, kept: int, other: int, tensor: Tensor) -> Tensor:
        """The other expert's tensor of that name, its neurons in the order of the kept expert's."""
        if name not in self._axes:
            return tensor
        if (kept, other) not in self._orders:
            self._orders[kept, other] = best_order(self._neurons(kept), self._neurons(other))
        return self._axes[name].reordered(tensor, self._orders[kept, other])

    def _neurons(self, expert: int) -> Tensor:
        rows = [axis.rows(self._read(name, expert).detach()).cpu() for name, axis in self._axes.items()]
        exact = torch.promote_types(rows[0].dtype, torch.float32)
        return torch.cat([part.to(exact) for part in rows], dim=1)
