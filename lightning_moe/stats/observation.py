"""Observation: attach the statistics of all layers to a model that is running anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.moe.experts import Assignments, ExpertHooks, expert_hooks
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.stats.expert_stats import ExpertStats
from lightning_moe.stats.layer_stats import LayerStats
from lightning_moe.stats.minibatch_cka import Kernel
from lightning_moe.stats.residual_cosines import record_cosines
from lightning_moe.stats.weights import weight_stats


class Observation:
    """The running statistics of every MoE layer of a model.

    Say which tokens come next with ``next_batch``, then run the model inside ``attached()``; ``compute`` gives a
    ``LayerStats`` per layer, summed over ranks.
    """

    def __init__(self, model: PreTrainedModel, cka_kernel: Kernel = "linear") -> None:
        self.layers = find_moe_layers(model)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        hidden_size, vocab_size = embedding.embedding_dim, embedding.num_embeddings
        self.stats = [ExpertStats(layer.num_experts, hidden_size, vocab_size, cka_kernel) for layer in self.layers]
        self._ids_T = self._mask_T = self._sequence_T = torch.empty(0)

    def to(self, device: torch.device) -> Observation:
        """Keep the sums on ``device``."""
        for stats in self.stats:
            stats.to(device)
        return self

    def next_batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Name the tokens of the coming forward, a row per sequence; those whose mask is 0 are not counted."""
        self._ids_T = input_ids.flatten()
        rows = torch.arange(input_ids.shape[:-1].numel(), device=input_ids.device)
        self._sequence_T = rows.repeat_interleave(input_ids.shape[-1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._mask_T = mask.flatten().bool()

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        routings: dict[str, Routing] = {}

        def observer(layer: MoELayer, stats: ExpertStats) -> Callable[[Assignments], None]:
            def observe(assignments: Assignments) -> None:
                # Under autocast the sums' products would be rounded to its type.
                with torch.no_grad(), torch.autocast(assignments.outputs_NH.device.type, enabled=False):
                    stats.update(routings.pop(layer.name), assignments, self._ids_T, self._mask_T, self._sequence_T)

            return observe

        hooks = {
            layer.name: ExpertHooks(observe=observer(layer, stats))
            for layer, stats in zip(self.layers, self.stats, strict=True)
        }
        stats_of = {layer.name: stats for layer, stats in zip(self.layers, self.stats, strict=True)}
        with (
            record_cosines(
                model,
                self.layers,
                lambda layer, block_T, decoder_T: stats_of[layer.name].add_cosines(block_T, decoder_T, self._mask_T),
            ),
            record_routing(self.layers, lambda layer, routing: routings.update({layer.name: routing})),
            expert_hooks(model, self.layers, hooks),
        ):
            yield

    def sums(self) -> dict[str, Tensor]:
        """What this rank has summed so far, to be given to ``load_sums`` of a later pass."""
        return {
            f"{layer.name}:{name}": getattr(stats, name)
            for layer, stats in zip(self.layers, self.stats, strict=True)
            for name in stats.names
        }

    def load_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on from saved sums."""
        for layer, stats in zip(self.layers, self.stats, strict=True):
            for name in stats.names:
                setattr(stats, name, sums[f"{layer.name}:{name}"].clone())
            stats._computed = None  # or torchmetrics would answer from its cache

    def compute(self, stable_ranks: bool = True) -> list[LayerStats]:
        """All layers' statistics, on the CPU; every rank must call it. ``stable_ranks``: see ``weight_stats``.

        Of experts that are masked out there are none.
        """
        result = []
        for layer, stats in zip(self.layers, self.stats, strict=True):
            sums: dict[str, Tensor] = {
                # torchmetrics squeezes the statistics of a single expert to scalars
                name: value.reshape(getattr(stats, name).shape).cpu()
                for name, value in stats.compute().items()
            }
            whole = LayerStats(layer.shape, **sums, **weight_stats(layer, stable_ranks))
            result.append(whole if layer.kept is None else whole.only(layer.kept))
        return result
