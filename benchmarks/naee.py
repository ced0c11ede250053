"""naee-cached: NAEE's exact search by cached outputs over running the block anew for every set of experts.

``python -m benchmarks.naee`` also prints how long that search and DiEP's take as the number of experts grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations, islice
from math import comb

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.observe import random_model
from benchmarks.ratios import median_ratio, report, seconds_of
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.routing import mask_experts
from lightning_moe.search.cached_outputs import CachedOutputs
from lightning_moe.search.in_memory import score_in_memory
from lightning_moe.search.naee import choose_experts, remove_experts

GOAL = 0.10
WINDOWS, LENGTH = 8, 64


def cached_choice(layer: MoELayer, hidden: Tensor, drop: int) -> list[int]:
    """What ``prune --method naee`` does for one layer, its block run on these inputs."""
    cache = CachedOutputs(layer)
    cache.next_batch(torch.ones(hidden.shape[:2]))
    with torch.no_grad():
        with cache.attached():
            layer.parts.block(hidden)
        return choose_experts(layer.shape, drop, cache.errors).keep


def plain_choice(layer: MoELayer, hidden: Tensor, drop: int) -> list[int]:
    """The same as anybody would write it: the block of the masked model, set by set."""

    def outputs() -> Tensor:
        with torch.no_grad():
            return layer.parts.block(hidden).double()

    whole, best, least = outputs(), (), float("inf")
    for keep in combinations(range(layer.num_experts), layer.num_experts - drop):
        with mask_experts(layer, keep):
            error = float((outputs() - whole).flatten(1).norm(dim=1).sum())
        if error < least:
            best, least = keep, error
    return list(best)


def main(repeats: int = 5) -> None:
    """One layer of 8 experts of which 4 go, 512 wide."""
    layer = find_moe_layers(random_model(8, 1024, 2))[0]
    hidden = torch.randn(WINDOWS, LENGTH, 512, generator=torch.Generator().manual_seed(0))
    chosen: dict[str, list[int]] = {}
    ratio = median_ratio(
        lambda: chosen.update(ours=cached_choice(layer, hidden, 4)),
        lambda: chosen.update(floor=plain_choice(layer, hidden, 4)),
        repeats,
        warmup=0,  # a round runs the block 76 times
    )
    assert chosen["ours"] == chosen["floor"], f"other experts: {chosen}"
    report("naee-cached", ratio, GOAL)


MEASURED_SETS, SAMPLED_SETS = 140_000, 10_000
"""Most sets of a layer that ``growth`` tries, and of how many it takes the time where there are more."""


def growth() -> None:
    """Seconds on models of two layers, 64 wide, at 25% and 50%, beside a DiEP search on the same 512 tokens.

    What is marked ~ follows from the time of some sets and the count of all.
    """
    print("experts  drop        sets     naee, exact  naee, beam        diep", flush=True)
    for num_experts in (8, 16, 24, 64):
        model = small_model(num_experts)
        ids = torch.randint(0, 512, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
        batches = [{"input_ids": some} for some in ids.split(2)]
        diep = seconds_of(lambda model=model, batches=batches: score_in_memory(model, batches, "diep"))  # type: ignore[misc]
        for drop in (num_experts // 4, num_experts // 2):
            exact, measured, beam = naee_seconds(model, ids, drop)
            sign = " " if measured else "~"
            sets = comb(num_experts, drop)
            print(
                f"{num_experts:7} {drop:5} {sets:11,.4g} {sign}{exact:13,.4g} s {beam:9.2f} s {diep:9.2f} s", flush=True
            )


def small_model(num_experts: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        initializer_range=0.05,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def naee_seconds(model: PreTrainedModel, ids: Tensor, drop: int) -> tuple[float, bool, float]:
    """Of the exact search and whether all of it was run, and of the beam."""
    caches = [CachedOutputs(layer) for layer in find_moe_layers(model)]
    shape = caches[0].layer.shape

    def fill() -> None:
        with torch.no_grad(), ExitStack() as watched:
            for cache in caches:
                cache.next_batch(torch.ones_like(ids))
                watched.enter_context(cache.attached())
            model.base_model(ids, use_cache=False)

    def weigh(sets: Sequence[tuple[int, ...]]) -> None:
        with torch.no_grad():
            for cache in caches:
                cache.errors(sets)

    def removed() -> None:
        with torch.no_grad():
            for cache in caches:
                remove_experts(shape, drop, cache.errors)

    filling = seconds_of(fill)
    count = comb(shape.num_experts, drop)
    tried = count if count <= MEASURED_SETS else SAMPLED_SETS
    sets = list(islice(combinations(range(shape.num_experts), shape.num_experts - drop), tried))
    exact = filling + seconds_of(lambda: weigh(sets)) * count / tried
    return exact, tried == count, filling + seconds_of(removed)


if __name__ == "__main__":
    main()
    growth()
