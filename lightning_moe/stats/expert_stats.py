"""ExpertStats: one layer's sums over tokens, as a torchmetric."""

# T tokens, K experts per token, N assignments sorted by expert, E experts, H model width, V vocabulary, R rows or bins

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from lightning_moe.moe.experts import Assignments
from lightning_moe.moe.routing import Routing
from lightning_moe.stats.minibatch_cka import Kernel, pair_hsic

BLOCK_ROWS = 512
"""Rows of outputs summed at once: small enough to stay in a core's cache over the passes."""

OUTLIER_STDS = 3.0
"""Entries further than this many standard deviations are outliers (MC-Suite, EAO)."""

RATIO_BINS = 4096
"""Bins of the ratio of routing weights: enough for a median to 1e-3."""


class ExpertStats(Metric):
    """All that the criteria, skipping and merging need of one MoE layer, from one pass.

    Every state is a float64 sum over tokens or sequences (or, for the sets of token ids, a boolean "or"), so shards,
    ranks and resumed passes add up to one pass. ``compute`` returns the states by name; see ``LayerStats`` for each.
    ``cka_kernel`` is that of the likeness of outputs.
    """

    full_state_update = False

    tokens: Tensor
    count_E: Tensor
    probability_E: Tensor
    soft_count_E: Tensor
    together_EE: Tensor
    logit_products_EE: Tensor
    seen_EV: Tensor
    norm_E: Tensor
    norm_sq_E: Tensor
    gated_norm_E: Tensor
    outliers_E: Tensor
    output_sum_EH: Tensor
    output_sq_EH: Tensor
    unit_sum_EH: Tensor
    ratio_R: Tensor
    hsic_EE: Tensor
    own_hsic_EE: Tensor
    layer_cosine: Tensor
    block_cosine: Tensor

    def __init__(
        self, num_experts: int, hidden_size: int, vocab_size: int, cka_kernel: Kernel = "linear", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.cka_kernel: Kernel = cka_kernel
        shapes = {
            "tokens": (),
            "count_E": (num_experts,),
            "probability_E": (num_experts,),
            "soft_count_E": (num_experts,),
            "together_EE": (num_experts, num_experts),
            "logit_products_EE": (num_experts, num_experts),
            "norm_E": (num_experts,),
            "norm_sq_E": (num_experts,),
            "gated_norm_E": (num_experts,),
            "outliers_E": (num_experts,),
            "output_sum_EH": (num_experts, hidden_size),
            "output_sq_EH": (num_experts, hidden_size),
            "unit_sum_EH": (num_experts, hidden_size),
            "ratio_R": (RATIO_BINS,),
            "hsic_EE": (num_experts, num_experts),
            "own_hsic_EE": (num_experts, num_experts),
            "layer_cosine": (),
            "block_cosine": (),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen_EV", torch.zeros(num_experts, vocab_size, dtype=torch.bool), dist_reduce_fx="max")
        self.names = (*shapes, "seen_EV")

    def update(
        self,
        routing: Routing,
        assignments: Assignments,
        input_ids_T: Tensor,
        mask_T: Tensor,
        sequence_T: Tensor | None = None,
    ) -> None:
        """Add one forward; ``mask_T`` is False at padding.

        ``sequence_T`` numbers the sequences from 0, in the order of tokens; by default all tokens are one.
        """
        if not bool(mask_T.any()):
            return
        self._add_routing(routing, input_ids_T, mask_T)
        sequence_T = torch.zeros_like(input_ids_T) if sequence_T is None else sequence_T
        hsic_EE, own_hsic_EE = pair_hsic(assignments, routing.expert_ids_TK, sequence_T, mask_T, self.cka_kernel)
        self.hsic_EE += hsic_EE
        self.own_hsic_EE += own_hsic_EE
        weights_TK = routing.weights_TK.float()
        total_T = weights_TK.sum(-1)
        share_N = assignments.weight_N.float() / total_T[assignments.token_N]
        outputs_NH, count_E = assignments.outputs_NH, assignments.count_E
        if not bool(mask_T.all()):
            real_N = mask_T[assignments.token_N]
            expert_N = torch.arange(count_E.shape[0], device=count_E.device).repeat_interleave(count_E)[real_N]
            outputs_NH, share_N = outputs_NH[real_N], share_N[real_N]
            count_E = torch.bincount(expert_N, minlength=count_E.shape[0])
        self._add_outputs(outputs_NH, share_N, count_E.tolist())

    def add_cosines(self, layer_T: Tensor, block_T: Tensor, mask_T: Tensor) -> None:
        """Add how alike the residual stream was over one forward, see ``residual_cosines``; beside ``update``."""
        self.layer_cosine += layer_T[mask_T].sum(dtype=torch.float64)
        self.block_cosine += block_T[mask_T].sum(dtype=torch.float64)

    def _add_routing(self, routing: Routing, input_ids_T: Tensor, mask_T: Tensor) -> None:
        expert_ids_TK, ids_T = routing.expert_ids_TK[mask_T], input_ids_T[mask_T]
        logits_TE = routing.logits_TE[mask_T].float()
        probability_TE = logits_TE.softmax(-1)
        chosen_TE = torch.zeros_like(probability_TE).scatter_(1, expert_ids_TK, 1.0)
        self.tokens += ids_T.shape[0]
        self.count_E += chosen_TE.sum(0)
        self.probability_E += probability_TE.sum(0)
        self.soft_count_E += (probability_TE * chosen_TE).sum(0)
        self.together_EE += chosen_TE.T @ chosen_TE
        logits_TE = logits_TE.masked_fill(logits_TE == -torch.inf, 0.0)  # of experts that are masked out
        self.logit_products_EE += logits_TE.T @ logits_TE
        self.seen_EV[expert_ids_TK, ids_T.unsqueeze(-1)] = True
        if expert_ids_TK.shape[-1] > 1:
            largest_T, second_T = routing.weights_TK[mask_T].float().topk(2).values.unbind(-1)
            ratio_T = (second_T / largest_T).nan_to_num().clamp(0, 1)
            bin_T = (ratio_T * RATIO_BINS).long().clamp(max=RATIO_BINS - 1)
            self.ratio_R += torch.bincount(bin_T, minlength=RATIO_BINS)

    def _add_outputs(self, outputs_NH: Tensor, share_N: Tensor, counts: list[int]) -> None:
        """Add the sorted rows of all experts, a block at a time, and the blocks' sums all at once."""
        experts: list[int] = []
        sums: list[dict[str, Tensor]] = []
        start = 0
        for expert, count in enumerate(counts):
            for first in range(start, start + count, BLOCK_ROWS):
                rows = slice(first, min(first + BLOCK_ROWS, start + count))
                experts.append(expert)
                sums.append(_block_sums(outputs_NH[rows].float(), share_N[rows]))
            start += count
        ids = torch.tensor(experts, device=outputs_NH.device)
        for name in sums[0]:
            getattr(self, name).index_add_(0, ids, torch.stack([block[name] for block in sums]))

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


def _block_sums(outputs_RH: Tensor, share_R: Tensor) -> dict[str, Tensor]:
    """One expert's sums over a block of rows, float64. Sums over rows are products with vectors: one pass each.

    The spread of a dimension may be tiny beside its mean, where float32 squares would drown it. So rows are squared
    around the block's mean ``m``, and ``sum x^2 = sum (x-m)^2 + 2 m sum (x-m) + R m^2`` in float64.
    """
    rows, width = outputs_RH.shape
    ones_R = outputs_RH.new_ones(rows)
    norm_R = torch.linalg.vector_norm(outputs_RH, dim=1)
    inverse_R = 1 / norm_R.clamp(min=torch.finfo(torch.float32).tiny)
    sums_2H = torch.stack([ones_R, inverse_R]) @ outputs_RH
    center_H = sums_2H[0] / rows
    centered_RH = outputs_RH - center_H
    rest_H, center_H = (ones_R @ centered_RH).double(), center_H.double()
    spread_H = (ones_R @ centered_RH.square_()).double()
    # Layer norm without its small constant gives deviations in units of std; a constant row gives NaN, no outlier.
    deviation_RH = functional.layer_norm(outputs_RH, (width,), eps=0.0).abs_()
    return {
        "norm_E": norm_R.sum(dtype=torch.float64),
        "norm_sq_E": norm_R.double().square().sum(),
        "gated_norm_E": (norm_R * share_R).sum(dtype=torch.float64),
        "outliers_E": (deviation_RH > OUTLIER_STDS).count_nonzero().double(),
        "output_sum_EH": rows * center_H + rest_H,
        "output_sq_EH": spread_H + 2 * center_H * rest_H + rows * center_H.square(),
        "unit_sum_EH": sums_2H[1].double(),
    }
