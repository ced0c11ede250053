"""RankMemory: what one rank holds at each moment of a job, in bytes.

At its fullest moment a job takes the sum of

- weights: as they are stored, a rank's part of what is split and all of the rest;
- gradients: of the type of the weights. A step begins with those of the step before, which go when its backward begins;
  then those of later layers are there when an earlier one goes back. DDP's buckets hold them a second time, always;
- optimizer: AdamW's two moments, of the type of the weights;
- activations: all else that lives in a step, the gradients of the layer at work included (``StepBytes``);
- statistics: what a job sums up;
- transient: gathered weights and buffers of collectives (``Gathering``), and what the optimizer's step or the loading
  makes on the way.

The allocator's own share is not in here: a GPU's caching allocator keeps freed blocks of unfit size, and CUDA, its
libraries and NCCL take 1 to 2 GiB; glibc keeps freed blocks of less than 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lightning_moe.evaluation.gathering import Gathering, Layout
from lightning_moe.moe.layer_passages import StepBytes
from lightning_moe.moe.weight_shards import SHARD_BYTES
from lightning_moe.moe.weights import Weight


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment, in bytes."""

    at: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    statistics: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        return sum(value for name, value in vars(self).items() if name != "at")


@dataclass(frozen=True)
class RankMemory:
    """The moments of a job that has these weights.

    Args:
        weights: The model's, as they are stored.
        layout: How they lie on the ranks.
        learns: Names of those that learn.
        statistics: Bytes that stay through the job.
        unpacked: The weights as they are read, where some are packed then.
        summed: Names of those whose gradients are summed up, in ``statistics``, and are gone once their layer is done.
    """

    weights: Sequence[Weight]
    layout: Layout
    learns: frozenset[str] = field(default_factory=frozenset)
    statistics: int = 0
    unpacked: Sequence[Weight] = ()
    summed: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def weight_bytes(self) -> int:
        return self.layout.held(self.weights)

    @cached_property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments."""
        return 2 * self.layout.held(self._learning)

    @cached_property
    def gradient_bytes(self) -> int:
        """Of a finished backward; twice with DDP."""
        return self.layout.held(self._learning) + self._buckets

    @property
    def host_bytes(self) -> int:
        """The CPU's memory that rank 0 takes from a GPU: what is offloaded, and what is on its way there or to disk."""
        if not self.layout.gpu:
            return 0
        here = replace(self, layout=replace(self.layout, offload=False))
        offloaded = here.weight_bytes + here.gradient_bytes + here.optimizer_bytes
        offloaded -= self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        loading = (0 if self.layout.split else here.weight_bytes) + self.reading(made=True)
        return offloaded + max(loading, self.saving_bytes, SHARD_BYTES if self.learns else 0)

    @property
    def saving_bytes(self) -> int:
        """What the saves of a tuning take in the CPU's memory.

        Of a split model what lies on a GPU is copied; of another the file is made in memory as a whole.
        """
        copied = self.layout.gpu or not self.layout.split
        return self.weight_bytes + self.optimizer_bytes if self.learns and copied else 0

    def saving(self) -> Moment:
        """While a save of a tuning is written, where that takes the memory it computes in."""
        transient = 0 if self.layout.gpu else self.saving_bytes
        return self.moment("saving", transient=transient, gradients=self.gradient_bytes)

    def moment(self, at: str, activations: int = 0, transient: int = 0, gradients: int = 0) -> Moment:
        return Moment(at, self.weight_bytes, gradients, self.optimizer_bytes, activations, self.statistics, transient)

    def loading(self) -> Moment:
        """While the last decoder layer is read, which goes to a GPU when it is made."""
        return Moment("loading", self.weight_bytes, transient=self.reading(made=not self.layout.gpu))

    def reading(self, made: bool) -> int:
        """What the reading of a layer takes above the weights: of a split model the layer as a whole.

        With what stacks are ``made`` of, where experts lie on disk one by one: as each is made, its pieces lie beside.
        """
        most = 0
        for layer in self._layers:
            own = [one for one in self.unpacked if one.layer == layer] or self._by_layer[layer]
            whole = sum(map(_bytes, own)) if self.layout.split else 0
            stacks = sorted((one for one in own if one.made is not None), key=lambda one: one.made or 0)
            done = beside = 0
            for stack in stacks:
                beside = max(beside, done + 2 * _bytes(stack))
                done += _bytes(stack)
            most = max(most, whole + (max(0, beside - done) if made else 0))
        return most

    def observing(self, activations: int, transient: int) -> Moment:
        """While statistics are taken of what a layer's experts gave."""
        largest = max(self._gathering.whole(layer) for layer in self._layers)
        return self.moment("statistics of a layer", activations, transient + self._gathering.whole(None) + 2 * largest)

    def figures(self, transient: int) -> Moment:
        """While figures are made of a layer's experts, which of a split model are gathered once more for it."""
        whole = max(sum(_bytes(w) for w in self._gathering.split(layer) if w.stack) for layer in self._layers)
        return self.moment("figures of the weights", 0, transient + whole)

    def moments(self, step: StepBytes, backward: bool = False, name: str = "") -> Iterator[Moment]:
        """The moments of one pass through the model, with its backward and an optimizer's step if it has some."""
        after, count, ranks = (f", {name}" if name else ""), len(step.layers), self._gathering
        root, gathered = ranks.whole(None), [ranks.whole(layer) for layer in range(count)]
        filling, copying = ([one(layer) for layer in range(count)] for one in (ranks.filling, ranks.copying))
        kept, level, levels = self.gradient_bytes if backward else 0, step.entry, []
        for layer, passage in enumerate(step.layers):
            buffer = gathered[layer - 1] if layer else 0
            gathering = root + buffer + max(filling[layer], copying[layer])
            if self.layout.split:
                yield self.moment(f"gathering of layer {layer}{after}", level, gathering, kept)
            computing = gathering if self.layout.gpu else root + 2 * gathered[layer]
            yield self.moment(f"forward of layer {layer}{after}", level + passage.forward, computing, kept)
            levels.append(level)
            level += passage.saved
        yield self.moment(f"head{after}", level + step.head, root + gathered[-1], kept)
        if not backward:
            return
        loss = level + step.head_backward
        yield self.moment(f"backward of the head{after}", loss, root + max(root, filling[-1]), self._buckets)
        reducing = 0
        for layer in reversed(range(count)):
            before, level, kept = level, levels[layer], self._kept_above(layer)
            coming, fills = (gathered[layer - 1], filling[layer - 1]) if layer else (0, 0)
            gathering = root + max(copying[layer], gathered[layer] + fills) + reducing
            if self.layout.split:
                yield self.moment(f"gathering of layer {layer} for its backward{after}", before, gathering, kept)
            back, computing = level + step.layers[layer].backward, root + gathered[layer] + coming + reducing
            yield self.moment(f"backward of layer {layer}{after}", back, computing, kept)
            reducing = ranks.reduction(layer)
            copies = ranks.gradients(layer) if self.layout.gpu else reducing
            reduction = root + coming + reducing + copies
            if reducing:
                kept = self._kept_above(layer - 1) + self._passing(layer)
                yield self.moment(f"reduction of layer {layer}{after}", level, reduction, kept)
        transient = root + reducing + ranks.gradients(None)
        yield self.moment(f"end of the backward{after}", step.entry + step.end, transient, self._kept_above(-1))
        if self.learns:
            yield self.moment("step of the optimizer", 0, self._step_bytes(), self.gradient_bytes)

    @cached_property
    def _by_layer(self) -> dict[int | None, list[Weight]]:
        found: dict[int | None, list[Weight]] = {None: []}
        for weight in self.weights:
            found.setdefault(weight.layer, []).append(weight)
        return found

    @property
    def _layers(self) -> list[int]:
        return [layer for layer in self._by_layer if layer is not None]

    @cached_property
    def _learning(self) -> list[Weight]:
        return [weight for weight in self.weights if weight.name in self.learns]

    @cached_property
    def _buckets(self) -> int:
        return self.layout.held(self._learning) if self.layout.buckets else 0

    def _kept_above(self, layer: int) -> int:
        """Gradients that are there when a layer goes back: of the layers above it, and of the head, still whole."""
        above = sum(size for number, size in self._layer_gradients.items() if number > layer)
        head = sum(_bytes(w) for w in self._by_layer[None] if w.name in self.learns and not w.looked_up)
        return above + head + self._buckets

    @cached_property
    def _layer_gradients(self) -> dict[int, int]:
        return {one: self.layout.held(w for w in self._by_layer[one] if w.name in self.learns) for one in self._layers}

    def _passing(self, layer: int) -> int:
        """A rank's part of a layer's gradients that are on their way to the sums."""
        return self.layout.held(weight for weight in self._by_layer[layer] if weight.name in self.summed)

    @cached_property
    def _gathering(self) -> Gathering:
        return Gathering(self.layout, self._by_layer, self.learns | self.summed)

    def _step_bytes(self) -> int:
        """What AdamW makes on the way: on GPUs one number for each that learns; else two of a weight at a time, beside
        one of the weight before."""
        groups = sorted(self._learning, key=lambda weight: len(weight.shape) < 2 or weight.looked_up)  # by decay
        sizes = [self.layout.held([weight]) for weight in groups]
        if self.layout.gpu:
            return sum(sizes)
        return max((2 * size + before for size, before in zip(sizes, [0, *sizes], strict=False)), default=0)


def _bytes(weight: Weight) -> int:
    return weight.numel * weight.dtype.itemsize
