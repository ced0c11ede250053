"""ExpertScan: the loss of a model without one of its experts, for each of them (MC-Suite, arXiv 2504.05586, Fig. 2).

An expert is removed by its router's logit at -inf, with the choice made anew by the router's own code, so that each
figure is what evaluating the masked model gives. What the models without one expert have in common is computed once:
all layers before the expert's own, and whole sequences where the router decides for every token as it did before.
"""

# B sequences, S positions, T = B * S tokens, E experts

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import Batch, next_token_loss, padding_mask
from lightning_moe.moe.layer_inputs import LayerInputs
from lightning_moe.moe.layers import LayerShape, MoELayer, find_moe_layers
from lightning_moe.moe.ranks import sum_over_ranks
from lightning_moe.moe.router_replay import RouterReplay, record_replays
from lightning_moe.moe.routing import mask_experts
from lightning_moe.moe.split_tensors import is_sharded

WHOLE, WORK = "whole model", "work"
"""Sums of no layer: loss and tokens of the whole model; decoder layers run, each on a sequence, and all there'd be."""

ROUNDING = 1e-6
"""Routing weights that differ by less than this part of the token's largest are equal: routers round so, in float32."""


@dataclass(frozen=True)
class ScannedExperts:
    """Mean loss in nats per predicted token, of the whole model and without each expert."""

    shapes: Sequence[LayerShape]
    loss: float
    tokens: int
    losses: Mapping[str, Sequence[float] | None]
    """Without each expert, by the layer's name; None for a layer whose router needs all the experts it has."""
    work: float
    """Decoder layers that were run on a sequence, over those of a forward of the masked model for each expert."""

    def rises(self, name: str) -> list[float]:
        """How much the loss rises without each expert of a layer; 0 where none can be spared, and none will be."""
        losses = self.losses[name]
        if losses is None:
            return [0.0] * next(shape.num_experts for shape in self.shapes if shape.name == name)
        return [loss - self.loss for loss in losses]


def can_spare_one(shape: LayerShape) -> bool:
    """Whether the router can still choose when any one of its experts is gone."""
    return shape.group_size > shape.fewest_per_group


class ExpertScan:
    """The loss without each expert, summed over batches.

    For each batch run the model inside ``recorded``, its decoder or all of it, then call ``add``. It holds the hidden
    states before each decoder layer with experts: of Mixtral 8x7B 0.5 GiB for each sequence of 2048 tokens, in 16 bits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, find_moe_layers(model)
        self.inputs = LayerInputs(model, [layer.shape.index for layer in self.layers])
        self.sums = {name: torch.zeros(2, dtype=torch.float64) for name in (WHOLE, WORK)}
        """Float64, on the CPU; to be saved, and put back by ``load_sums``."""
        self.sums |= {layer.name: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in self.layers}
        self._shapes = [layer.shape for layer in self.layers]
        self._replays: dict[str, RouterReplay] = {}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        self.sums = {name: sums[name].clone() for name in self.sums}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The whole model runs inside the context, once."""

        def keep(layer: MoELayer) -> Callable[[RouterReplay], None]:
            return lambda replay: self._replays.update({layer.name: replay})

        with self.inputs.recorded(), ExitStack() as watched:
            for layer in self.layers:
                watched.enter_context(record_replays(layer, keep(layer)))
            yield

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add the losses of the batch that was run last. Where the model is split, all ranks must call it."""
        last = len(self.inputs.layers)
        whole_B, count_B = self._losses(last, batch)
        self.sums[WHOLE] += torch.stack([whole_B.double().sum(), count_B.double().sum()]).cpu()
        for layer, shape in zip(self.layers, self._shapes, strict=True):
            if can_spare_one(shape):
                changed_EB, run_E = self._changed(layer, batch)
                sums_E = [
                    self._without(layer, shape.index, expert, batch, whole_B, changed_B, run)
                    for expert, (changed_B, run) in enumerate(zip(changed_EB, run_E.tolist(), strict=True))
                ]
                self.sums[layer.name] += torch.stack(sums_E).cpu()
                self.sums[WORK][1] += len(changed_EB) * int((count_B > 0).sum()) * last  # rows that fill up aside
        self.inputs.forget()
        self._replays = {}

    def _without(
        self, layer: MoELayer, number: int, expert: int, batch: Batch, whole_B: Tensor, changed_B: Tensor, run: bool
    ) -> Tensor:
        """Summed loss of the batch, of which only the changed sequences are run; a scalar, float64."""
        if not run:
            return whole_B.double().sum()
        rows_B = changed_B.nonzero().squeeze(1)
        # Other ranks wait for this one to gather the weights with it.
        shown_B = rows_B if len(rows_B) else rows_B.new_zeros(1)
        with mask_experts(layer, [one for one in range(layer.num_experts) if one != expert]):
            loss_B, _ = self._losses(number, batch, None if len(rows_B) == len(whole_B) else shown_B)
        self.sums[WORK][0] += len(shown_B) * (len(self.inputs.layers) - number)
        return whole_B.index_copy(0, rows_B, loss_B[: len(rows_B)]).double().sum()

    def _losses(self, number: int, batch: Batch, rows_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``next_token_loss``, by a forward that begins at this decoder layer, of some sequences or all."""
        if rows_B is not None:
            batch = {name: batch[name][rows_B] for name in ("input_ids", "attention_mask")}
        # Of layers passed over there are no logits, which a loss on all of them would miss.
        told = {"output_router_logits": False} if getattr(self.model.config, "output_router_logits", False) else {}
        with self.inputs.begun_at(number, rows_B):
            mask = padding_mask(batch)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **told).logits
        return next_token_loss(logits, batch)

    def _changed(self, layer: MoELayer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where some real token is routed otherwise without an expert, ``(E, B)``, and whether to run it, ``(E,)``.

        By other experts, or by other weights: where these are shares of a softmax over all experts, all of them change.
        """
        real_T, count = batch["attention_mask"].bool().flatten(), len(batch["attention_mask"])
        replay, experts = self._replays[layer.name], range(layer.num_experts)
        whole_TE = replay.weights(experts)
        least_T1 = ROUNDING * whole_TE.amax(1, keepdim=True)
        changed = []
        for expert in experts:
            weights_TE = replay.weights([one for one in experts if one != expert])
            changed_T = real_T & ((weights_TE - whole_TE).abs() > least_T1).any(1)
            changed.append(changed_T.view(count, -1).any(1))
        changed_EB = torch.stack(changed)
        run_E = changed_EB.any(1)
        # A split model runs on all ranks or on none.
        return changed_EB, sum_over_ranks(run_E.long()) > 0 if is_sharded(self.model) else run_E

    def result(self, device: torch.device | str = "cpu") -> ScannedExperts:
        """Of all ranks together, by way of ``device``; every rank must call it.

        Raises ``InputError`` when a loss is not finite.
        """
        sums = {name: sum_over_ranks(value.to(device, copy=True)).cpu() for name, value in self.sums.items()}
        loss, tokens = sums[WHOLE].tolist()
        spared = {shape.name: can_spare_one(shape) for shape in self._shapes}
        losses = {name: (sums[name] / tokens).tolist() if can else None for name, can in spared.items()}
        if not math.isfinite(loss):
            raise InputError(f"the loss of the whole model is {loss}; are the weights damaged?")
        for name, row in losses.items():
            for expert, one in enumerate(row or ()):
                if not math.isfinite(one):
                    raise InputError(f"{name}: without expert {expert} the loss is {one}; give --model.dtype float32.")
        run, all_of_it = sums[WORK].tolist()
        return ScannedExperts(self._shapes, loss / tokens, int(tokens), losses, run / max(all_of_it, 1.0))
