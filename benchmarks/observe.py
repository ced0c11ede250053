"""observe-e8, observe-e64: the observation pass over a bare forward of the same model and batch."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.ratios import median_ratio, report
from lightning_moe.stats.observation import Observation

GOAL = 1.25
TOKENS = 2048
SETTINGS = {"observe-e8": (8, 1024, 2), "observe-e64": (64, 256, 4)}


def random_model(num_experts: int, width: int, top_k: int) -> PreTrainedModel:
    """Four layers of 512 wide, as Mixtral, with routers that have a preference."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        initializer_range=0.05,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def main(repeats: int = 9) -> None:
    for name, setting in SETTINGS.items():
        model = random_model(*setting)
        ids = torch.randint(0, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        observation = Observation(model)

        def floor(model: PreTrainedModel = model, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model.base_model(ids, use_cache=False)

        def observed(
            model: PreTrainedModel = model, ids: torch.Tensor = ids, observation: Observation = observation
        ) -> None:
            observation.next_batch(ids)
            with torch.no_grad(), observation.attached(model):
                model.base_model(ids, use_cache=False)

        report(name, median_ratio(observed, floor, repeats), GOAL)


if __name__ == "__main__":
    main()
