"""Passages: what a step through a model holds beside weights, from one decoder layer of each kind."""

# L decoder layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.hidden_states import as_given, given_back, put_back, tuple_size
from lightning_moe.moe.live_bytes import LiveBytes
from lightning_moe.moe.stand_ins import StandIn, standing_in


@dataclass(frozen=True)
class Passage:
    """What one decoder layer adds, in bytes."""

    saved: int
    """Left behind by its forward, for its backward: what the next layer finds more than it did."""
    forward: int
    """Most at once during its forward, above what it found."""
    backward: int = 0
    """Most at once during its backward, above what it found in its forward: what it saved, what it computes anew, and
    the gradients of its own weights that are there by then."""


@dataclass(frozen=True)
class StepBytes:
    """What one step holds beside weights, in bytes: tensors that live, by the moment."""

    entry: int
    """Before the first layer: ids, embeddings, masks, and whatever an earlier pass left."""
    layers: tuple[Passage, ...]
    head: int
    """Most at once after the last layer, above what it left: norm, logits, loss."""
    head_backward: int = 0
    """The same in the backward of these, with the gradients of their own weights."""
    end: int = 0
    """Most at once when the first layer's backward is done, above ``entry``: the gradient of the embeddings."""

    @property
    def saved(self) -> int:
        """Left behind by all layers' forward."""
        return self.entry + sum(layer.saved for layer in self.layers)


Step = Callable[[Callable[[Tensor], None]], None]
"""A step; where it goes back from its loss it calls what it is given on the loss, instead of ``backward``."""


def trace_step(model: nn.Module, step: Step) -> list[StepBytes]:
    """Run a step on tensors without content (see ``imagined``) and say what each of its passes through the model holds.

    Of decoder layers that are alike one is run, the first aside: it is given what no gradient may be asked for. So are
    others up to the first with weights that learn, which tells them from those above it. The rest hand on what they are
    given.
    """
    layers = decoder_layers(model)
    learns = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    kinds = [(*_kind(layer), any(learns[:number])) for number, layer in enumerate(layers)]
    samples = [0, *(kinds.index(kind, 1) for kind in kinds[1:])]
    roots = {id(parameter) for parameter in model.parameters()}
    roots -= {id(parameter) for layer in layers for parameter in layer.parameters()}
    with _watched(layers, set(samples)) as watch, LiveBytes([*model.parameters(), *model.buffers()]) as live:
        watch.live = live
        watch.roots = [parameter for parameter in model.parameters() if id(parameter) in roots]

        def backward(loss: Tensor) -> None:
            watch.mark("loss")
            loss.backward()
            watch.mark("done")

        watch.mark("start")
        step(backward)
        watch.mark("done")
    return [one.bytes(samples) for one in watch.passes]


def _kind(layer: nn.Module) -> Any:
    """Equal for layers that hold alike tensors and settings."""
    tensors = [(name, one.shape, one.dtype, one.requires_grad) for name, one in layer.named_parameters()]
    tensors += [(name, one.shape, one.dtype, False) for name, one in layer.named_buffers()]
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, str | bool)}
    return tensors, settings


class _Pass:
    """The segments of one pass through the model, each with its level at the start and its peak."""

    def __init__(self) -> None:
        self.segments: dict[Any, tuple[int, int]] = {}

    def bytes(self, sample_of: Sequence[int]) -> StepBytes:
        """By layer; ``sample_of`` names for each the one that was run in its place."""
        found = self.segments
        order = sorted(set(sample_of))
        starts = [found["forward", one][0] for one in order] + [found["head"][0]]
        saved = {one: after - start for one, start, after in zip(order, starts, starts[1:], strict=False)}
        passages = {}
        for one, start in zip(order, starts, strict=False):
            backward = found.get(("backward", one), (0, start))[1]
            passages[one] = Passage(saved[one], found["forward", one][1] - start, backward - start)
        entry, level = starts[0], starts[-1]
        return StepBytes(
            entry,
            tuple(passages[one] for one in sample_of),
            found["head"][1] - level,
            found["loss"][1] - level if "loss" in found else 0,
            max(0, found["end"][1] - entry) if "end" in found else 0,
        )


class _Watch:
    """Cuts a step into segments: entry, each layer's forward, head, loss, each layer's backward, end."""

    def __init__(self) -> None:
        self.live: LiveBytes | None = None
        self.passes: list[_Pass] = []
        self.roots: list[nn.Parameter] = []
        """Weights of no decoder layer."""
        self.tuple_size: int | None = None
        """Of what layers return; None for a tensor."""
        self._segment: tuple[_Pass, Any, int] | None = None

    def mark(self, name: Any) -> None:
        """End a segment and begin another."""
        assert self.live is not None
        if self._segment is not None:
            place, last, start = self._segment
            before = place.segments.get(last, (start, 0))
            place.segments[last] = (before[0], max(before[1], self.live.peak))
        self.live.begin()
        place = self.passes[-1] if self.passes else _Pass()
        self._segment = (place, name, self.live.now)

    def begin_pass(self) -> None:
        self.passes.append(_Pass())


class _Watched(StandIn):
    """A decoder layer that is run, or one that hands on what it is given."""

    def __init__(self, layer: nn.Module, number: int, last: bool, run: bool, watch: _Watch) -> None:
        super().__init__(layer)
        vars(self)["watch"] = watch
        self.number, self.last, self.run = number, last, run

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        if self.number == 0:
            watch.begin_pass()
        watch.mark(("forward", self.number) if self.run else "between")
        if not self.run:
            result = as_given(hidden, watch.tuple_size)
        else:
            hidden = _Boundary.apply(hidden, self._leave)  # type: ignore[no-untyped-call]
            result = self.layer(hidden, *args, **kwargs)
            watch.tuple_size = tuple_size(result)
            output = given_back(result)
            output = _Boundary.apply(output, self._enter)  # type: ignore[no-untyped-call]
            result = put_back(result, output)
            del hidden, output
        if self.last:
            watch.mark("head")
        return result

    def _enter(self) -> None:
        _forget_gradients(self.watch.roots)
        self.watch.mark(("backward", self.number))

    def _leave(self) -> None:
        _forget_gradients(self.layer.parameters())
        self.watch.mark("between" if self.number else "end")


def _forget_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Finished gradients are not a step's but the ranks', who may split them."""
    for parameter in parameters:
        parameter.grad = None


class _Boundary(torch.autograd.Function):
    """Changes nothing, and calls when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.call()
        return gradients[0], None


@contextmanager
def _watched(layers: nn.ModuleList, samples: set[int]) -> Iterator[_Watch]:
    watch, last = _Watch(), len(layers) - 1
    watched = {n: _Watched(layer, n, n == last, n in samples, watch) for n, layer in enumerate(layers)}
    with standing_in(layers, watched):
        yield watch
