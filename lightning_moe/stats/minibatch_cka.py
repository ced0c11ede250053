"""How alike the outputs of two experts are: sums for minibatch CKA, over the tokens that both experts of a pair see.

A minibatch is one sequence, so the sums do not depend on how sequences are batched. HSIC is the unbiased estimator
HSIC_1 (Song et al. 2012, eq. 5), as in minibatch CKA (Nguyen, Raghu, Kornblith 2021); since sequences share different
numbers of tokens, each weighs by that number. Cost is bounded by sampling: evenly spread tokens of a sequence, few
enough that an expert gets about ``PER_EXPERT`` of them, and at most ``PER_PAIR`` of a pair.
"""

# T tokens, K experts per token, N assignments sorted by expert, E experts, H model width, B sequences,
# A sampled assignments, G = B * E groups (an expert on a sequence), M rows per group,
# P pairs of experts on a sequence, S sampled tokens per pair

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_moe.moe.experts import Assignments

Kernel = Literal["linear", "rbf"]

PER_EXPERT = 128
"""Sampled tokens of a sequence that an expert gets when all are used alike; it uses no more than that."""

PER_PAIR = 16
"""Most sampled tokens of a sequence that count for one pair."""

FEWEST = 4
"""HSIC_1 needs as many."""

CHUNK_VALUES = 1 << 24
"""Most values of outputs gathered at once."""


def pair_hsic(
    assignments: Assignments, expert_ids_TK: Tensor, sequence_T: Tensor, mask_T: Tensor, kernel: Kernel = "linear"
) -> tuple[Tensor, Tensor]:
    """Sums over sequences of HSIC_1 of each pair's outputs, and of each expert's with themselves.

    Two ``(E, E)`` float64 tables: ``[i, j]`` of the first is for outputs of ``i`` against those of ``j``, of the
    second for outputs of ``i`` against themselves, both on tokens that ``i`` and ``j`` share. Diagonals are 0.
    ``sequence_T`` numbers the sequences in the order of tokens; ``mask_T`` is False at padding.
    """
    num_experts, width = assignments.count_E.shape[0], assignments.outputs_NH.shape[-1]
    cross_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=mask_T.device)
    own_EE = torch.zeros_like(cross_EE)
    top_k = expert_ids_TK.shape[-1]
    if top_k < 2 or num_experts < 2:
        return cross_EE, own_EE
    sampled_T = _sampled(sequence_T, mask_T, max(FEWEST, PER_EXPERT * num_experts // top_k))
    count = int(sequence_T.max()) + 1
    longest = min(PER_EXPERT, int(torch.bincount(sequence_T[sampled_T], minlength=1).max()))
    step = max(1, CHUNK_VALUES // (num_experts * longest * width))
    for start in range(0, count, step):
        chunk_T = sampled_T & (sequence_T >= start) & (sequence_T < start + step)
        if bool(chunk_T.any()):
            _add_chunk(cross_EE, own_EE, assignments, expert_ids_TK, sequence_T - start, chunk_T, kernel)
    return cross_EE, own_EE


def _sampled(sequence_T: Tensor, mask_T: Tensor, limit: int) -> Tensor:
    """Every n-th real token of each sequence, so that at most ``limit`` are taken; bool ``(T,)``."""
    real_sequence = sequence_T[mask_T]
    length_B = torch.bincount(real_sequence)
    start_B = length_B.cumsum(0) - length_B
    rank = torch.arange(real_sequence.shape[0], device=mask_T.device) - start_B[real_sequence]
    every_B = (length_B + limit - 1) // limit
    sampled_T = torch.zeros_like(mask_T)
    sampled_T[mask_T] = rank % every_B[real_sequence] == 0
    return sampled_T


def _add_chunk(
    cross_EE: Tensor,
    own_EE: Tensor,
    assignments: Assignments,
    expert_ids_TK: Tensor,
    sequence_T: Tensor,
    sampled_T: Tensor,
    kernel: Kernel,
) -> None:
    num_experts = cross_EE.shape[0]
    products_GMM, slot_TE = _products(assignments, sequence_T, sampled_T, num_experts)
    # Each sampled token's pairs of experts, the lower id first, and the rows of both in their groups.
    token = sampled_T.nonzero().squeeze(1)
    ids = expert_ids_TK[token].sort(-1).values
    lower, upper = torch.triu_indices(ids.shape[-1], ids.shape[-1], 1, device=ids.device)
    first, second = ids[:, lower].flatten(), ids[:, upper].flatten()
    token = token.repeat_interleave(lower.shape[0])
    slots = torch.stack([slot_TE[token, first], slot_TE[token, second]])
    usable = (slots >= 0).all(0)
    pair = ((sequence_T[token] * num_experts + first) * num_experts + second)[usable]
    pair, order = pair.sort(stable=True)
    pair_P, count_P = pair.unique_consecutive(return_counts=True)
    rank = _rank(count_P)
    wanted = (rank < PER_PAIR) & (count_P >= FEWEST).repeat_interleave(count_P)
    if not bool(wanted.any()):
        return
    pair_P, count_P = pair_P[count_P >= FEWEST], count_P[count_P >= FEWEST].clamp(max=PER_PAIR)
    row = torch.arange(pair_P.shape[0], device=pair.device).repeat_interleave(count_P)
    slot_2PS = slots.new_zeros(2, pair_P.shape[0], int(count_P.max()))
    slot_2PS[:, row, rank[wanted]] = slots[:, usable][:, order][:, wanted]
    first_P, second_P = pair_P // num_experts % num_experts, pair_P % num_experts
    group_P = pair_P // num_experts**2 * num_experts
    K_PSS = _submatrices(products_GMM, group_P + first_P, slot_2PS[0], count_P, kernel)
    L_PSS = _submatrices(products_GMM, group_P + second_P, slot_2PS[1], count_P, kernel)
    for table_EE, i_P, j_P, value_P in (
        (cross_EE, first_P, second_P, cross_P := hsic(K_PSS, L_PSS, count_P) * count_P),
        (cross_EE, second_P, first_P, cross_P),
        (own_EE, first_P, second_P, hsic(K_PSS, K_PSS, count_P) * count_P),
        (own_EE, second_P, first_P, hsic(L_PSS, L_PSS, count_P) * count_P),
    ):
        table_EE.view(-1).index_add_(0, i_P * num_experts + j_P, value_P)


def _products(
    assignments: Assignments, sequence_T: Tensor, sampled_T: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Inner products of each expert's outputs on each sequence, ``(G, M, M)``, and where tokens are in them.

    That is the row of each token among those of each expert, ``(T, E)``, or -1.
    """
    chosen_A = sampled_T[assignments.token_N].nonzero().squeeze(1)
    ends_E = assignments.count_E.cumsum(0)
    expert_A = torch.searchsorted(ends_E, chosen_A, right=True)
    group_A = sequence_T[assignments.token_N[chosen_A]] * num_experts + expert_A
    group_A, order_A = group_A.sort(stable=True)
    chosen_A, expert_A = chosen_A[order_A], expert_A[order_A]
    num_groups = (int(sequence_T[sampled_T].max()) + 1) * num_experts
    rank_A = _rank(torch.bincount(group_A, minlength=num_groups))
    used_A = rank_A < PER_EXPERT
    chosen_A, expert_A, group_A, rank_A = chosen_A[used_A], expert_A[used_A], group_A[used_A], rank_A[used_A]
    outputs_AH = assignments.outputs_NH[chosen_A].float()
    rows_GMH = outputs_AH.new_zeros(num_groups, int(rank_A.max()) + 1, outputs_AH.shape[-1])
    rows_GMH[group_A, rank_A] = outputs_AH
    count_G = torch.bincount(group_A, minlength=num_groups)
    # HSIC does not change when all rows move; near the origin their products lose fewer digits.
    rows_GMH -= (rows_GMH.sum(1) / count_G.clamp(min=1).unsqueeze(-1)).unsqueeze(1)
    slot_TE = torch.full((sampled_T.shape[0], num_experts), -1, device=sampled_T.device)
    slot_TE[assignments.token_N[chosen_A], expert_A] = rank_A
    return torch.bmm(rows_GMH, rows_GMH.transpose(1, 2)), slot_TE


def _rank(counts: Tensor) -> Tensor:
    """0, 1, ... within each of consecutive groups of these sizes."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=counts.device) - starts.repeat_interleave(counts)


def _submatrices(products_GMM: Tensor, group_P: Tensor, slot_PS: Tensor, count_P: Tensor, kernel: Kernel) -> Tensor:
    """The kernel of rows ``slot_PS`` of each pair's group, ``(P, S, S)`` float64; 0 on the diagonal and outside."""
    rows = products_GMM.shape[-1]
    row_PS = (group_P.unsqueeze(1) * rows + slot_PS) * rows
    picked_PSS = products_GMM.view(-1)[row_PS.unsqueeze(2) + slot_PS.unsqueeze(1)]
    real_PS = torch.arange(slot_PS.shape[1], device=count_P.device) < count_P.unsqueeze(1)
    real_PSS = real_PS.unsqueeze(2) & real_PS.unsqueeze(1)
    real_PSS.diagonal(dim1=1, dim2=2).fill_(False)
    if kernel == "rbf":
        picked_PSS = _rbf(picked_PSS, real_PSS)
    return picked_PSS.masked_fill(~real_PSS, 0.0).double()


def _rbf(products_PSS: Tensor, real_PSS: Tensor) -> Tensor:
    """``exp(-d^2 / 2 m)``, ``m`` the median squared distance between two rows of the pair's tokens."""
    square_PS = products_PSS.diagonal(dim1=1, dim2=2)
    distance_PSS = (square_PS.unsqueeze(2) + square_PS.unsqueeze(1) - 2 * products_PSS).clamp(min=0)
    median_P = distance_PSS.masked_fill(~real_PSS, torch.nan).flatten(1).nanmedian(1).values
    return torch.exp(-distance_PSS / (2 * median_P.clamp(min=torch.finfo(torch.float32).tiny)).view(-1, 1, 1))


def hsic(K_PSS: Tensor, L_PSS: Tensor, count_P: Tensor) -> Tensor:
    """HSIC_1 of symmetric kernel matrices with 0 on the diagonal, on ``count_P >= 4`` samples each; ``(P,)``."""
    n_P = count_P.double()
    trace_P = (K_PSS * L_PSS).sum((1, 2))
    row_K_PS, row_L_PS = K_PSS.sum(2), L_PSS.sum(2)
    sums_P = row_K_PS.sum(1) * row_L_PS.sum(1) / ((n_P - 1) * (n_P - 2))
    rows_P = (row_K_PS * row_L_PS).sum(1) * 2 / (n_P - 2)
    return (trace_P + sums_P - rows_P) / (n_P * (n_P - 3))
