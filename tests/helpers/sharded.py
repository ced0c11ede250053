"""What each of several processes does with a model that is split over them."""

# R ranks

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.moe.checkpoints import save_model
from lightning_moe.moe.ranks import average_over_ranks
from lightning_moe.moe.sharding import Sharding, make_mesh
from lightning_moe.moe.split_tensors import is_split, whole
from tests.helpers.families import tiny_model
from tests.helpers.forked_ranks import start_ranks

Check = Callable[[Path, Sharding], None]


def on_ranks(ranks: int, folder: Path, *checks: Check, replicas: int = 1, offload: bool = False) -> None:
    """Carry out every check on ``ranks`` gloo processes of one start; what fails on any says which and why."""
    start_ranks(_work, ranks, ranks, replicas, offload, folder, checks)


def _work(rank: int, ranks: int, replicas: int, offload: bool, folder: Path, checks: tuple[Check, ...]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    store = f"file://{folder / f'store-{ranks}-{replicas}-{offload}'}"
    patience = timedelta(minutes=3)  # with a rank that failed where another still waits
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    try:
        _carry_out(checks, folder, Sharding(make_mesh("cpu", ranks, replicas), offload=offload))
    finally:
        gc.collect()  # the last users of the group's threads go with it, see cli/leaving.py
        torch.distributed.destroy_process_group()


def _carry_out(checks: tuple[Check, ...], folder: Path, sharding: Sharding) -> None:
    ranks = torch.distributed.get_world_size()
    for check in checks:
        problem = None
        try:
            check(folder, sharding)
        except Exception:
            problem = traceback.format_exc()
        problems: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(problems, problem)
        assert problems == [None] * ranks, f"{check}\n" + "\n".join(filter(None, problems))


def written(family: str, folder: Path, name: str | None = None, **settings: Any) -> Path:
    """The checkpoint of a tiny model, written by one rank for all."""
    target = folder / (name or family)
    if torch.distributed.get_rank() == 0 and not target.exists():
        save_model(tiny_model(family, **settings), target)
    torch.distributed.barrier()
    return target


def split_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients as a whole, after those that are not split are averaged as the strategy does."""
    average_over_ranks(p.grad for p in model.parameters() if p.grad is not None and not is_split(p))
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def same_weights(one: nn.Module, other: nn.Module) -> None:
    mine, yours = one.state_dict(), other.state_dict()
    assert mine.keys() == yours.keys()
    assert [name for name in mine if mine[name].dtype != yours[name].dtype] == []
    assert [name for name in mine if not torch.equal(whole(mine[name]), whole(yours[name]))] == []
    buffers = zip(one.named_buffers(), other.named_buffers(), strict=True)
    assert [name for (name, mine_), (_, yours_) in buffers if not torch.equal(mine_, yours_)] == []


@contextmanager
def only_rank(number: int) -> Iterator[bool]:
    """Whether this is that rank; the others wait at the end."""
    yield torch.distributed.get_rank() == number
    torch.distributed.barrier()
