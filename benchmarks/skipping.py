"""skipping-e8, skipping-e64: an MoE block that skips experts over the same block without."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from benchmarks.observe import SETTINGS, TOKENS, random_model
from benchmarks.ratios import median_ratio, report
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import set_skipping, skipped
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.similarity import skip_tables

GOAL = 1.0


def main(repeats: int = 31) -> None:
    """By the tables of the model itself, observed on random tokens: about half of them skip their second expert."""
    for name, setting in SETTINGS.items():
        model = random_model(*setting)
        ids = torch.randint(0, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        observation = Observation(model)
        observation.next_batch(ids)
        with torch.no_grad(), observation.attached(model):
            model.base_model(ids, use_cache=False)
        skipping_model = random_model(*setting)
        set_skipping(skipping_model, skip_tables(observation.compute()))
        hidden = torch.randn(1, TOKENS, 512, generator=torch.Generator().manual_seed(0))

        def floor(model: PreTrainedModel = model, hidden: torch.Tensor = hidden) -> None:
            with torch.no_grad():
                find_moe_layers(model)[0].parts.block(hidden)

        def ours(model: PreTrainedModel = skipping_model, hidden: torch.Tensor = hidden) -> None:
            with torch.no_grad():
                find_moe_layers(model)[0].parts.block(hidden)

        report(name.replace("observe", "skipping"), median_ratio(ours, floor, repeats), GOAL)
        assert any(one for one, _ in skipped(skipping_model).values()), "nothing was skipped"


if __name__ == "__main__":
    main()
