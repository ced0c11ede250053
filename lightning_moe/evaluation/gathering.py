"""What a split model's ranks gather and reduce, in bytes; and how a model lies on them.

Of a split model each decoder layer is gathered before it computes. Let ``g`` be its split weights in the type they are
gathered in. The all-gather fills a buffer of ``g``, from a copy of the rank's part where types differ; gloo, on CPUs,
fills it over another ``g``. From the buffer ``g`` is copied out, what is not split along its first dimension over one
copy more. In a forward the buffer of the layer before is there until then. In a backward the buffer of the layer to
come is filled before a layer computes. A layer's gradients are whole until its backward is done, and are then copied
into a float32 buffer to be reduced (gloo: with a copy of it), which stays until that of the next layer takes its place.
What belongs to no decoder layer is gathered from the beginning of a forward to its end and again through the backward,
at whose end its gradients, whole until then, are reduced. On a GPU the blocks that buffers had serve nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_moe.moe.weights import Weight

REDUCED_BYTES = 4
"""Of a gradient while it is reduced over ranks."""


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks, and what they are.

    Args:
        ranks: That one copy of the model is split over.
        split: Whether the model is split and gathered by moe_fsdp, be it on one rank.
        gathered: Type in which decoder layers are gathered; None is that of the weights.
        buckets: Whether DDP keeps buckets of gradients.
        offload: Whether what is split lies in the CPU's memory, with its gradients and optimizer.
        gpu: Whether ranks compute on GPUs.
    """

    ranks: int = 1
    split: bool = False
    gathered: torch.dtype | None = None
    buckets: bool = False
    offload: bool = False
    gpu: bool = False

    def itemsize(self, weight: Weight) -> int:
        """Bytes of one number of a weight that is gathered: what belongs to no decoder layer is gathered as it is."""
        as_it_is = weight.layer is None or not weight.dtype.is_floating_point
        return (weight.dtype if as_it_is else self.gathered or weight.dtype).itemsize

    def held(self, weights: Iterable[Weight]) -> int:
        """Bytes of weights, or of what is like them, on this rank's device."""
        return sum(
            weight.on_rank(self.ranks) * weight.dtype.itemsize
            for weight in weights
            if not (self.offload and weight.split)
        )


@dataclass(frozen=True)
class Gathering:
    """What is gathered with each decoder layer (None: with the rest of the model), and what is reduced after it.

    Args:
        layout: How the model lies on the ranks; where it is not split all of this is nothing.
        by_layer: Its weights as they are stored.
        reduced: Names of those that get gradients.
    """

    layout: Layout
    by_layer: Mapping[int | None, Sequence[Weight]]
    reduced: Collection[str]

    def split(self, layer: int | None) -> list[Weight]:
        """What is gathered with a layer, or with the rest of the model."""
        return [weight for weight in self.by_layer[layer] if weight.split] if self.layout.split else []

    def whole(self, layer: int | None, copied: bool = False) -> int:
        """Bytes of a layer as it is gathered; ``copied``: of what is not split along its first dimension alone."""
        return sum(
            weight.numel * self.layout.itemsize(weight)
            for weight in self.split(layer)
            if not (copied and weight.split_dimension(self.layout.ranks) == 0)
        )

    def filling(self, layer: int) -> int:
        """The buffer of a layer's all-gather, with what it is filled from and over."""
        gathered = self.whole(layer)
        cast = sum(
            weight.on_rank(self.layout.ranks) * self.layout.itemsize(weight)
            for weight in self.split(layer)
            if self.layout.itemsize(weight) != weight.dtype.itemsize
        )
        return gathered + cast + (0 if self.layout.gpu or self.layout.ranks == 1 else gathered)

    def copying(self, layer: int) -> int:
        """That buffer, and what is copied out of it."""
        return 2 * self.whole(layer) + self.whole(layer, copied=True)

    def gradients(self, layer: int | None) -> int:
        """Gradients of a split layer before they are reduced."""
        return sum(w.numel * self.layout.itemsize(w) for w in self.split(layer) if w.name in self.reduced)

    def reduction(self, layer: int) -> int:
        """The buffer that a layer's gradients are reduced in."""
        return sum(weight.numel * REDUCED_BYTES for weight in self.split(layer) if weight.name in self.reduced)
