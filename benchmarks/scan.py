"""scan-shared: the scan of all experts over masking each expert and running the whole model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from benchmarks.observe import random_model
from benchmarks.ratios import median_ratio, report
from lightning_moe.modules.causal_lm import Batch, next_token_loss
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.routing import mask_experts
from lightning_moe.search.expert_scan import ExpertScan

GOAL = 0.75
"""Of 4 layers the mean forward runs 2.5, and the head. With many layers the ratio comes down to a half."""

WINDOWS, LENGTH = 4, 64

Losses = dict[str, list[float]]


@torch.no_grad()
def shared(model: PreTrainedModel, batch: Batch) -> Losses:
    """What ``scan`` does with a batch."""
    scan = ExpertScan(model)
    with scan.recorded():
        model.base_model(batch["input_ids"], use_cache=False)
    scan.add(batch)
    return {name: list(row or ()) for name, row in scan.result().losses.items()}


@torch.no_grad()
def naive(model: PreTrainedModel, batch: Batch) -> Losses:
    losses: Losses = {}
    for layer in find_moe_layers(model):
        for expert in range(layer.num_experts):
            with mask_experts(layer, [one for one in range(layer.num_experts) if one != expert]):
                logits = model(batch["input_ids"], use_cache=False).logits
            loss_B, count_B = next_token_loss(logits, batch)
            losses.setdefault(layer.name, []).append(float(loss_B.double().sum() / count_B.sum()))
    return losses


def main(repeats: int = 5) -> None:
    """Four layers of 8 experts, 512 wide; every window sees every expert."""
    model = random_model(8, 1024, 2)
    ids = torch.randint(0, 4096, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found: dict[str, Losses] = {}
    ratio = median_ratio(
        lambda: found.update(ours=shared(model, batch)), lambda: found.update(floor=naive(model, batch)), repeats, 0
    )
    for name, row in found["floor"].items():
        furthest = max(abs(one - other) for one, other in zip(found["ours"][name], row, strict=True))
        assert furthest < 1e-5, f"{name}: losses differ by {furthest}"
    report("scan-shared", ratio, GOAL)


if __name__ == "__main__":
    main()
