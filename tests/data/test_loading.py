"""Batches: the same on any number of ranks, and continued where they stopped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.data.loading import RankBatches, ResumableLoader
from lightning_moe.data.packing import PackedText

counts = st.integers(1, 60)
sizes = st.integers(1, 9)


def all_batches(
    windows: int, batch_size: int, world_size: int = 1, epoch: int = 0, **kwargs: Any
) -> list[list[list[int]]]:
    """Per rank, its batches."""
    ranks = []
    for rank in range(world_size):
        batches = RankBatches(windows, batch_size, rank, world_size, **kwargs)
        batches.epoch = epoch
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    return ranks


@given(counts, sizes, st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 3))
def test_ranks_together_are_one_rank_with_larger_batches(
    windows: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    kwargs = {"shuffle": shuffle, "drop_last": drop_last, "seed": 5, "epoch": epoch}
    ranks = all_batches(windows, batch_size, world_size, **kwargs)
    (alone,) = all_batches(windows, batch_size * world_size, **kwargs)
    assert len({len(batches) for batches in ranks}) == 1
    together = [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)]
    assert together == alone


@given(counts, sizes, st.integers(1, 5), st.booleans())
def test_every_window_once_and_blanks_at_the_end(windows: int, batch_size: int, world_size: int, shuffle: bool) -> None:
    ranks = all_batches(windows, batch_size, world_size, shuffle=shuffle)
    order = list(itertools.chain(*itertools.chain(*zip(*ranks, strict=True))))
    assert sorted(order[:windows]) == list(range(windows))
    assert order[windows:] == [-1] * (len(order) - windows)
    assert len(order) - windows < batch_size * world_size
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    if not shuffle:
        assert order[:windows] == list(range(windows))


@given(counts, sizes, st.integers(1, 5))
def test_drop_last_has_no_blanks(windows: int, batch_size: int, world_size: int) -> None:
    ranks = all_batches(windows, batch_size, world_size, drop_last=True, shuffle=True)
    order = list(itertools.chain(*itertools.chain(*ranks)))
    assert len(set(order)) == len(order) == windows // (batch_size * world_size) * batch_size * world_size
    assert -1 not in order


def test_order_is_of_seed_and_epoch_alone() -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1, 7), (0, 1, 2)):
        torch.manual_seed(seed + epoch)
        (order,) = all_batches(50, 4, shuffle=True, seed=seed, epoch=epoch)
        assert order == all_batches(50, 4, shuffle=True, seed=seed, epoch=epoch)[0]
        orders[seed, epoch] = str(order)
    assert len(set(orders.values())) == len(orders)


@given(counts, sizes, st.data())
def test_start_skips_what_was_done_once(windows: int, batch_size: int, data: st.DataObject) -> None:
    batches = RankBatches(windows, batch_size, shuffle=True)
    whole = list(batches)
    batches.start = data.draw(st.integers(0, len(whole)))
    rest = whole[batches.start :]
    assert list(batches) == rest
    assert list(batches) == whole  # the start was that of one epoch


def loader(windows: int = 13, batch_size: int = 3) -> ResumableLoader:
    tokens = torch.arange(windows, dtype=torch.int32).unsqueeze(1).expand(-1, 4).contiguous()
    text = PackedText(tokens, torch.full((windows,), 4), torch.zeros(windows, dtype=torch.long), ("d",))
    return ResumableLoader(text, RankBatches(windows, batch_size, shuffle=True, drop_last=True, seed=3))


def rows(batch: dict[str, Any]) -> list[int]:
    found: list[int] = batch["input_ids"][:, 0].tolist()
    return found


@pytest.mark.parametrize("done", range(13))
def test_a_restored_loader_goes_on_exactly(done: int) -> None:
    """Three epochs of 4 batches, cut after ``done`` of them: in the middle, at an end, before the start."""
    whole = loader()
    expected = [rows(batch) for _ in range(3) for batch in whole]
    assert len(expected) == 12
    first = loader()
    seen: list[list[int]] = []
    state = first.state_dict()
    for batch in itertools.chain.from_iterable(iter(first) for _ in range(3)):
        if len(seen) == done:
            break
        seen.append(rows(batch))
        state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    while len(seen) < 12:
        seen += [rows(batch) for batch in second]
    assert seen == expected


def test_state_after_an_epoch_is_the_next_ones_start() -> None:
    at_last, after = loader(), loader()
    states = [at_last.state_dict() for _ in at_last]
    list(after)
    assert states[-1] == after.state_dict() == {"epoch": 1, "done": 0}
    assert states[0] == {"epoch": 0, "done": 1}


def test_an_epoch_cut_short_is_still_an_epoch() -> None:
    """Lightning's ``limit_train_batches`` leaves an epoch early; the next one must have another order."""
    cut = loader()
    first = [rows(batch) for batch in itertools.islice(cut, 2)]
    second = [rows(batch) for batch in itertools.islice(cut, 2)]
    assert first != second


def test_length_is_the_number_of_batches() -> None:
    assert len(loader()) == 4 == len(list(loader()))
