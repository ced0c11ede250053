"""SameTokenCKA: how alike the outputs of all experts of a model are, of one layer or of two (DiEP, Fig. 1).

All experts are run on the same tokens, wherever the router sends these, so that any two can be compared. CKA is
linear, by the unbiased HSIC_1 as in ``minibatch_cka``: with fewer tokens than the model is wide, the biased one finds
everything alike. HSIC_1 is a product of U-centred Gram matrices (Szekely and Rizzo 2014), so CKA of all pairs is one
product of matrices: a row for each expert, a column for each pair of tokens.
"""

# B windows, S positions, T tokens of the sample, P = T (T - 1) / 2 pairs of them, H model width, E experts of a layer,
# A experts of all layers

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.errors import InputError
from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.hidden_states import taken
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.ranks import sum_over_ranks
from lightning_moe.moe.sharding import gathered_weights
from lightning_moe.moe.skipping import compute_rows
from lightning_moe.stats.minibatch_cka import FEWEST

ROWS = 8192
"""Expert outputs that are held at a time."""

MEMORY = 8 << 30
"""Most bytes of centred Gram matrices: with 512 tokens 0.5 MiB for each expert, 0.13 GiB for Mixtral 8x7B."""


def check_sample(num_tokens: int, num_experts: int) -> None:
    """Raise ``InputError`` for a number of tokens that is too small, or too large for that many experts in all."""
    most = int((MEMORY / (2 * num_experts)) ** 0.5)
    if not FEWEST <= num_tokens <= most:
        raise InputError(
            f"--similarity_tokens {num_tokens}: between {FEWEST} and {most} for {num_experts} experts, whose Gram "
            f"matrices then take {MEMORY >> 30} GiB; or 0 for none."
        )


class SameTokenCKA:
    """Gathers what the layers' experts are given on some tokens of a text, and compares their outputs on them.

    Fill it by forwards of the model inside ``attached``, each announced by ``next_batch``, with every window of the
    sample once over all ranks; then every rank asks for ``compute``. It holds ``T H`` float32 numbers for each layer,
    in the CPU's memory (Mixtral 8x7B with 512 tokens: 0.25 GiB), and rank 0 while it computes ``A P`` besides.

    Args:
        model: The model.
        lengths: Real tokens of each window.
        num_tokens: Tokens to take, as many of each window and evenly spread over it; all of a window that is shorter.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int], num_tokens: int) -> None:
        self.layers, self._owners = find_moe_layers(model), decoder_layers(model)
        self.positions: list[list[int]] = []
        """In each window, those that are taken."""
        for window, length in enumerate(lengths):
            share = (window + 1) * num_tokens // len(lengths) - window * num_tokens // len(lengths)
            count = min(share, length)
            self.positions.append([(2 * turn + 1) * length // (2 * count) for turn in range(count)])
        self._starts = [sum(map(len, self.positions[:window])) for window in range(len(lengths) + 1)]
        self._inputs: dict[str, Tensor] = {}
        self._types: dict[str, torch.dtype] = {}
        self._tokens = self._slots = torch.empty(0, dtype=torch.long)

    @property
    def num_tokens(self) -> int:
        """Tokens in the sample."""
        return self._starts[-1]

    def next_batch(self, windows: Sequence[int], seq_len: int) -> None:
        """Name the windows of the coming forward by number, -1 for a blank one."""
        shown = [(row, window) for row, window in enumerate(windows) if window >= 0]
        self._tokens = torch.tensor(
            [row * seq_len + place for row, window in shown for place in self.positions[window]], dtype=torch.long
        )
        self._slots = torch.tensor(
            [slot for _, window in shown for slot in range(*self._starts[window : window + 2])], dtype=torch.long
        )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the layers inside the context; what they give stays as it is."""

        def keeper(layer: MoELayer) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = taken(args, kwargs)
                self._keep(layer.name, hidden.reshape(-1, hidden.shape[-1]).detach())

            return before

        with ExitStack() as handles:
            for layer in self.layers:
                handle = layer.experts.register_forward_pre_hook(keeper(layer), with_kwargs=True)
                handles.callback(handle.remove)
            yield

    def _keep(self, name: str, hidden_TH: Tensor) -> None:
        if name not in self._inputs:
            self._inputs[name] = torch.zeros(self.num_tokens, hidden_TH.shape[-1])
            self._types[name] = hidden_TH.dtype
        self._inputs[name][self._slots] = hidden_TH[self._tokens.to(hidden_TH.device)].float().cpu()

    @torch.no_grad()
    def compute(self, writes: bool = True) -> Tensor | None:
        """CKA of every two experts, ``(A, A)`` float32 in the order of layers, 1 on the diagonal.

        NaN where the outputs of one do not depend on the token. None on ranks that do not ask for it by ``writes``.
        """
        counts = [layer.num_experts for layer in self.layers]
        pairs = self.num_tokens * (self.num_tokens - 1) // 2
        rows_AP = torch.empty(sum(counts), pairs) if writes else torch.empty(0, 0)
        for turn, layer in enumerate(self.layers):
            device = layer.router_weight.device
            hidden_TH = sum_over_ranks(self._inputs[layer.name].to(device)).to(self._types[layer.name])
            with gathered_weights(self._owners[layer.parts.index]):
                if writes:
                    first = sum(counts[:turn])
                    rows_AP[first : first + counts[turn]] = self._centred(layer, hidden_TH).cpu()
        if not writes:
            return None
        cka_AA = (rows_AP @ rows_AP.T).clamp(0.0, 1.0)
        known_A = ~cka_AA.diagonal().isnan()
        return cka_AA.fill_diagonal_(1.0).masked_fill(~(known_A[:, None] & known_A), torch.nan)

    def _centred(self, layer: MoELayer, hidden_TH: Tensor) -> Tensor:
        """U-centred Gram matrices of the experts' outputs, each of length 1, ``(E, P)`` float32."""
        num_tokens = len(hidden_TH)
        first_P, second_P = torch.triu_indices(num_tokens, num_tokens, 1, device=hidden_TH.device)
        rows = []
        for some_E in torch.arange(layer.num_experts, device=hidden_TH.device).split(max(1, ROWS // num_tokens)):
            ids_TE = some_E.expand(num_tokens, len(some_E))
            outputs_NH = compute_rows(layer.experts, hidden_TH, ids_TE).outputs_NH  # sorted by expert
            outputs_ETH = outputs_NH.view(len(some_E), num_tokens, -1).float()
            with torch.autocast(hidden_TH.device.type, enabled=False):
                outputs_ETH = outputs_ETH - outputs_ETH.mean(1, keepdim=True)  # near the origin fewer digits are lost
                gram_ETT = (outputs_ETH @ outputs_ETH.mT).double()
            gram_ETT.diagonal(dim1=1, dim2=2).zero_()
            sum_ET1 = gram_ETT.sum(2, keepdim=True)
            mean_E11 = sum_ET1.sum(1, keepdim=True) / ((num_tokens - 1) * (num_tokens - 2))
            part_ET1 = sum_ET1 / (num_tokens - 2)
            rows_EP = (gram_ETT - part_ET1 - part_ET1.mT + mean_E11)[:, first_P, second_P]
            rows.append((rows_EP / rows_EP.norm(dim=1, keepdim=True)).float())
        return torch.cat(rows)
