"""How evenly a router spreads its tokens: counts while a model runs, and the figures of their skew."""

# T tokens, K experts per token, E experts

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing

FIGURES = ("cv", "max_over_mean", "entropy", "gini", "dead")
"""The figures of ``load_figures``."""


def load_figures(count_E: Sequence[float]) -> dict[str, float]:
    """The skew of one layer's load, from the tokens each expert got.

    ``cv`` standard deviation over mean, ``max_over_mean``, ``entropy`` over its maximum ``log E`` (1 is even; 1 too
    for a single expert), ``gini`` (0 is even), and ``dead``, the number of experts without a token. Without any
    token, all experts are dead and the load is as uneven as can be.
    """
    experts, total = len(count_E), float(sum(count_E))
    if total == 0:
        worst = {"cv": math.sqrt(experts - 1), "max_over_mean": float(experts), "entropy": 0.0}
        return worst | {"gini": 1 - 1 / experts, "dead": float(experts)}
    share_E = sorted(count / total for count in count_E)
    variance = sum((share - 1 / experts) ** 2 for share in share_E) / experts
    entropy = sum(share * -math.log(share) for share in share_E if share > 0) + 0.0
    ranked = sum((2 * rank - experts - 1) * share for rank, share in enumerate(share_E, start=1))
    return {
        "cv": experts * math.sqrt(variance),
        "max_over_mean": experts * share_E[-1],
        "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "gini": ranked / experts,
        "dead": float(sum(count == 0 for count in count_E)),
    }


def mean_load(counts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The figures of all layers, averaged; ``dead`` is summed."""
    layers = [load_figures(count_E) for count_E in counts.values()]
    sums = {name: sum(layer[name] for layer in layers) for name in FIGURES}
    return {name: value if name == "dead" else value / len(layers) for name, value in sums.items()}


def load_record(counts: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """The figures of each layer with its ``counts``, and under ``mean`` those of all: as records keep them."""
    return {"mean": mean_load(counts)} | {
        name: load_figures(count_E) | {"counts": count_E} for name, count_E in counts.items()
    }


class RouterCounts:
    """Tokens that each router gives each of its experts, summed while a model runs.

    Say what comes with ``next_batch``; padding is not counted. ``paused`` stops counting, as for a backward pass in
    which layers run again. Counts of before and after experts are dropped do not go together: ``take`` them when
    ``stale`` says so, or the next batch starts anew. It makes no difference whether weights are cut or masked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = find_moe_layers(model)
        self.counts: dict[str, Tensor] = {}
        """Per layer ``(E,)`` float64, on the layer's device, with those that are masked out."""
        self.paused = False
        self._mask_T: Tensor | None = None
        self._left: list[Sequence[int]] | None = None
        """Of each layer the experts that are counted; None before the first batch."""

    @property
    def stale(self) -> bool:
        """Whether layers have lost experts since counting began; the same on all ranks."""
        return self._left is not None and self._left != self._left_now()

    def _left_now(self) -> list[Sequence[int]]:
        return [
            range(layer.num_experts) if layer.kept is None or len(layer.kept) == layer.num_experts else layer.kept
            for layer in self.layers
        ]

    def next_batch(self, mask: Tensor | None) -> None:
        """``mask``, of any shape, is 0 at padding; None when nothing is padded."""
        self._mask_T = None if mask is None else mask.flatten()
        if self._left is None or self.stale:
            self._start()

    def _start(self) -> None:
        self.counts, self._left = {}, self._left_now()

    @contextmanager
    def attached(self) -> Iterator[None]:
        with record_routing(self.layers, self.add):
            yield

    def mask_of(self, routing: Routing) -> Tensor | None:
        """The mask of the tokens of a routing decision; None where nothing is padded, or the mask is of others."""
        mask_T = self._mask_T
        return mask_T if mask_T is not None and mask_T.shape[0] == routing.expert_ids_TK.shape[0] else None

    def add(self, layer: MoELayer, routing: Routing) -> None:
        """Count one routing decision."""
        if self.paused:
            return
        ids_TK, mask_T = routing.expert_ids_TK, self.mask_of(routing)
        ones_TK = torch.ones_like(ids_TK, dtype=torch.float64)
        if mask_T is not None:
            ones_TK *= mask_T.to(ones_TK)[:, None]
        count_E = self.counts.get(layer.name)
        if self._left is None or (count_E is not None and count_E.shape[0] != layer.num_experts):
            self._start()
            count_E = None
        if count_E is None:
            count_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=ids_TK.device)
        # index_add waits for no device, as bincount would.
        self.counts[layer.name] = count_E.index_add(0, ids_TK.flatten(), ones_TK.flatten())

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """The counts of all layers in the order of depth, summed over ranks by ``reduce``; counting starts anew.

        Every rank must call it; a layer that saw nothing counts zeros. Experts that were masked out are left out.
        """
        taken = {}
        for layer, left in zip(self.layers, self._left or self._left_now(), strict=True):
            size = max(layer.num_experts, len(left))  # of a layer that is cut since: as it was
            zeros_E = torch.zeros(size, dtype=torch.float64, device=layer.router_weight.device)
            count_E = reduce(self.counts.get(layer.name, zeros_E)).tolist()
            taken[layer.name] = [count_E[i] for i in left]
        self.counts, self._left = {}, None
        return taken
