"""What one of several processes does: observe its share of the sequences, then reduce."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_moe.stats.layer_stats import TENSORS
from lightning_moe.stats.observation import Observation
from tests.helpers.families import tiny_batch, tiny_model


def observe_share(rank: int, world_size: int, shares: list[list[int]], folder: Path) -> None:
    """Observe the sequences ``shares[rank]`` of a batch and write the reduced statistics of every layer."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        model = tiny_model("qwen2_moe")
        batch = tiny_batch(batch=4)
        observation = Observation(model)
        with torch.no_grad(), observation.attached(model):
            for sequence in shares[rank]:
                observation.next_batch(batch[[sequence]])
                model(batch[[sequence]])
        own = {name: value.clone() for name, value in observation.sums().items()}
        layers = observation.compute()
        again = observation.compute()
        tensors = {f"{turn}:{name}": getattr(layer, name) for turn, layer in enumerate(layers) for name in TENSORS}
        for turn, layer in enumerate(again):
            assert all(torch.equal(getattr(layer, name), tensors[f"{turn}:{name}"]) for name in TENSORS)
        assert all(torch.equal(value, own[name]) for name, value in observation.sums().items())
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank-{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()
