"""The relaxations and the loss of DiEP, slow and obvious: one token, one expert at a time, from the formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.reference.stock_experts import run_alone


def shares(alpha_E: Tensor) -> list[Tensor]:
    """softmax(alpha), Eq. 4."""
    powers = [torch.exp(alpha) for alpha in alpha_E.unbind()]
    total = sum(powers, torch.zeros(()))
    return [power / total for power in powers]


@contextmanager
def slowly_relaxed(
    parts: Sequence[tuple[nn.Module, nn.Module]], alphas: Sequence[Tensor], beta_L: Tensor, relaxation: str
) -> Iterator[None]:
    """Run (router, experts) by the printed formulas inside the context."""
    handles = []
    for (router, experts), alpha_E, beta in zip(parts, alphas, beta_L.unbind(), strict=True):
        given: list[Tensor] = []
        handles.append(router.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0])))
        vars(experts)["forward"] = _slow_experts(router, experts, alpha_E, beta, relaxation, given)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, experts in parts:
            del vars(experts)["forward"]


def _slow_experts(
    router: nn.Module, experts: nn.Module, alpha_E: Tensor, beta: Tensor, relaxation: str, given: list[Tensor]
) -> Any:
    num_experts = len(alpha_E)
    matrix_EH = next(p for p in router.parameters() if p.dim() == 2)
    biases = [p for name, p in router.named_parameters() if name.rpartition(".")[2] == "bias"]

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        router_input_TH = given[-1].reshape(hidden_TH.shape[0], -1)
        a = shares(alpha_E)
        rows = []
        for token, x_H in enumerate(hidden_TH):
            if relaxation == "routed":
                chosen, given_K = ids.view(len(hidden_TH), -1)[token].tolist(), weights.view(len(hidden_TH), -1)[token]
                terms = {i: weight * num_experts * a[i] for i, weight in zip(chosen, given_K, strict=True)}
            elif relaxation == "dense-routed":
                logits = [matrix_EH[i] @ router_input_TH[token] for i in range(num_experts)]
                if biases:
                    logits = [logit + biases[0][i] for i, logit in enumerate(logits)]
                w = shares(torch.stack(logits))
                terms = {i: w[i] * num_experts * a[i] for i in range(num_experts)}
            else:
                terms = dict(enumerate(a))
            row_H = torch.zeros_like(x_H)
            for expert, factor in terms.items():
                row_H = row_H + factor * run_alone(experts, expert, x_H[None])[0]
            rows.append(beta * row_H)
        return torch.stack(rows).view_as(hidden)

    return forward


def cross_entropy(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean over the pairs of neighbours that are both real."""
    losses = [
        -logits_BSV[row, place].double().log_softmax(-1)[ids_BS[row, place + 1]]
        for row in range(ids_BS.shape[0])
        for place in range(ids_BS.shape[1] - 1)
        if mask_BS[row, place] and mask_BS[row, place + 1]
    ]
    return torch.stack(losses).mean()


def whole_loss(
    model: PreTrainedModel,
    parts: Sequence[tuple[nn.Module, nn.Module]],
    alphas: Sequence[Tensor],
    beta_L: Tensor,
    relaxation: str,
    ids_BS: Tensor,
    weight: float,
    pressure: float,
) -> Tensor:
    """The default loss: cross entropy, relative distance at the head's input, mean gate. Nothing is padded."""

    def run() -> tuple[Tensor, Tensor]:
        hidden_BSH = model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state
        return hidden_BSH, model.get_output_embeddings()(hidden_BSH)

    start = [torch.zeros_like(alpha_E) for alpha_E in alphas], torch.ones_like(beta_L)
    with torch.no_grad(), slowly_relaxed(parts, *start, "routed"):
        teacher_BSH, _ = run()
    with slowly_relaxed(parts, alphas, beta_L, relaxation):
        student_BSH, logits_BSV = run()
    distance = ((student_BSH - teacher_BSH) ** 2).sum() / (teacher_BSH**2).sum()
    gates = [
        beta * len(alpha_E) * share
        for alpha_E, beta in zip(alphas, beta_L.unbind(), strict=True)
        for share in shares(alpha_E)
    ]
    mean_gate = sum((gate.abs() for gate in gates), torch.zeros(())) / len(gates)
    loss: Tensor = cross_entropy(logits_BSV, ids_BS, torch.ones_like(ids_BS)) + weight * distance + pressure * mean_gate
    return loss
