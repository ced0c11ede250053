"""CachedOutputs: what every expert of a layer would say of every token, kept as products of their outputs.

With ``w`` a token's routing weights of the full router and ``v`` those of a router that is left with a set of experts,
the layer's output changes by ``sum_i (w_i - v_i) f_i``. Its squared length is ``(w - v)' G (w - v)`` with the Gram
matrix ``G_ij = f_i . f_j``, so that a set costs its routing and ``E^2`` products for each token, and no expert.
"""

# T tokens, W windows of text, S sets of experts, E experts, P = E (E + 1) / 2 pairs of them, H model width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.moe.hidden_states import taken
from lightning_moe.moe.layers import LayerShape, MoELayer
from lightning_moe.moe.ranks import sum_over_ranks
from lightning_moe.moe.router_replay import RouterReplay, record_replays
from lightning_moe.moe.skipping import compute_rows

ROWS = 8192
"""Expert outputs that are held at a time while products are made: 8192 of 4096 wide take 0.3 GiB in float64."""

ELEMENTS = 1 << 22
"""Numbers of a tensor of products or of weights while sets are weighed: 32 MiB in float64."""


def bytes_per_token(shape: LayerShape) -> int:
    """What ``CachedOutputs`` keeps of a token: its products, and at most 8 bytes for each logit."""
    return 8 * (shape.num_experts * (shape.num_experts + 1) // 2 + shape.num_experts + 1)


@dataclass(frozen=True)
class _Batch:
    """The tokens of one forward that count."""

    gram_TP: Tensor
    replay: RouterReplay
    window_T: Tensor
    num_windows: int


class CachedOutputs:
    """The outputs of all experts of one layer on all tokens of a text, as far as sets of experts differ by them.

    Fill it by forwards of the model inside ``attached``, each announced by ``next_batch``; then ask for ``errors``.
    It holds ``bytes_per_token`` for each of this rank's tokens, in the CPU's memory: at 8 experts 360 bytes, at 64
    16.7 kB, so 0.1 GB and 4.4 GB for 128 windows of 2048. Beside that it needs ``ROWS`` expert outputs while it is
    filled, and about ``3 * ELEMENTS`` numbers while sets are weighed.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self._batches: list[_Batch] = []
        self._mask_BS = torch.empty(0, 0)
        self._replay: RouterReplay | None = None
        self._first_P, self._second_P = torch.triu_indices(layer.num_experts, layer.num_experts)

    def next_batch(self, mask_BS: Tensor) -> None:
        """Name the tokens of the coming forward, a row for each window; those whose mask is 0 do not count."""
        self._mask_BS = mask_BS.bool()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the layer inside the context. All experts see all tokens; what the layer gives stays as it is."""

        def seen(replay: RouterReplay) -> None:
            self._replay = replay

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = taken(args, kwargs)
            with torch.no_grad():
                self._add(hidden.reshape(-1, hidden.shape[-1]))

        # A split model has its weights together only while its layer runs, so the outputs are made there and then.
        handle = self.layer.experts.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with record_replays(self.layer, seen):
                yield
        finally:
            handle.remove()

    def _add(self, hidden_TH: Tensor) -> None:
        replay, self._replay = self._replay, None
        assert replay is not None, f"{self.layer.name}: its experts ran before its router"
        token_T = self._mask_BS.flatten().nonzero().squeeze(1)
        if not len(token_T):
            return
        step = max(1, ROWS // self.layer.num_experts)
        gram_TP = torch.cat([self._products(hidden_TH[some_T]) for some_T in token_T.split(step)])
        num_windows, length = self._mask_BS.shape
        window_T = (token_T // length).cpu()
        self._batches.append(_Batch(gram_TP, replay.rows(token_T, "cpu"), window_T, num_windows))

    def _products(self, hidden_TH: Tensor) -> Tensor:
        """Of the outputs of all experts on these tokens, ``(T, P)`` float64, on the CPU."""
        num_tokens, num_experts = len(hidden_TH), self.layer.num_experts
        ids_TE = torch.arange(num_experts, device=hidden_TH.device).expand(num_tokens, num_experts)
        outputs_NH = compute_rows(self.layer.experts, hidden_TH, ids_TE).outputs_NH  # sorted by expert
        outputs_TEH = outputs_NH.view(num_experts, num_tokens, -1).transpose(0, 1).double()
        with torch.autocast(outputs_TEH.device.type, enabled=False):
            gram_TEE = outputs_TEH @ outputs_TEH.mT
        return gram_TEE[:, self._first_P, self._second_P].cpu()

    def errors(self, keeps: Sequence[Sequence[int]]) -> Tensor:
        """How far the layer's output moves when only these experts are left, ``(S,)`` float64, over all ranks.

        ``sum over windows || Z - Zhat ||_F`` (NAEE, arXiv 2402.14800): ``Z`` is the weighted sum of the routed
        experts, ``Zhat`` the same after the router has chosen anew with the others' logits at -inf. Shared experts
        cancel, and a model that skips experts is taken as one that does not. A window is a batch of its own, so that
        neither the batch size nor the number of ranks counts. An empty set has ``Zhat = 0``: its error is the size of
        the output itself. Every rank must call it.
        """
        device = self.layer.router_weight.device
        errors_S = torch.zeros(len(keeps), dtype=torch.float64, device=device)
        step = max(1, ELEMENTS // self.layer.num_experts**2)
        for batch in self._batches:
            squares_SW = errors_S.new_zeros(len(keeps), batch.num_windows)
            for first in range(0, len(batch.window_T), step):
                self._add_squares(squares_SW, batch, slice(first, first + step), keeps)
            errors_S += squares_SW.clamp(min=0.0).sqrt().sum(1)
        return sum_over_ranks(errors_S)

    def _add_squares(self, squares_SW: Tensor, batch: _Batch, rows: slice, keeps: Sequence[Sequence[int]]) -> None:
        """Add the squared errors of some tokens to those of their windows."""
        device, num_experts = squares_SW.device, self.layer.num_experts
        replay, window_T = batch.replay.rows(rows, device), batch.window_T[rows].to(device)
        gram_TP = batch.gram_TP[rows].to(device)
        gram_TEE = gram_TP.new_empty(len(gram_TP), num_experts, num_experts)
        gram_TEE[:, self._first_P, self._second_P] = gram_TP
        gram_TEE[:, self._second_P, self._first_P] = gram_TP
        whole_TE = replay.weights(range(num_experts))
        step = max(1, ELEMENTS // (len(gram_TP) * num_experts))
        for first in range(0, len(keeps), step):
            some = keeps[first : first + step]
            change_TSE = torch.stack([whole_TE - replay.weights(keep) if keep else whole_TE for keep in some], dim=1)
            squares_TS = ((change_TSE @ gram_TEE) * change_TSE).sum(-1)
            squares_SW[first : first + step].index_add_(1, window_T, squares_TS.T)
