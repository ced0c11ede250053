"""gates: the experts function with a gate on every expert, over the stock grouped path."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.observe import SETTINGS, TOKENS, random_model
from benchmarks.ratios import median_ratio, report
from lightning_moe.moe.experts import ExpertHooks, experts_forward
from lightning_moe.moe.layers import find_moe_layers

GOAL = 1.05


def main(repeats: int = 31) -> None:
    """The slower of the two settings, forward and backward to inputs and gates, as a search step does."""
    ratios = []
    for num_experts, width, top_k in SETTINGS.values():
        layer = find_moe_layers(random_model(num_experts, width, top_k))[0]
        for parameter in layer.experts.parameters():
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(TOKENS, 512, generator=generator).requires_grad_()
        _, weights_TK, ids_TK = layer.router(hidden_TH)
        weights_TK = weights_TK.detach().requires_grad_()
        gates_E = torch.ones(num_experts, requires_grad=True)
        stock = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

        def floor(layer=layer, inputs=(hidden_TH, ids_TK, weights_TK), stock=stock) -> None:  # type: ignore[no-untyped-def]
            stock(layer.experts, *inputs).sum().backward()

        def ours(layer=layer, inputs=(hidden_TH, ids_TK, weights_TK), gates_E: Tensor = gates_E) -> None:  # type: ignore[no-untyped-def]
            layer.experts.lightning_moe_hooks = ExpertHooks(gates_E=gates_E)
            experts_forward(layer.experts, *inputs).sum().backward()

        ratios.append(median_ratio(ours, floor, repeats))
    report("gates", max(ratios), GOAL)


if __name__ == "__main__":
    main()
