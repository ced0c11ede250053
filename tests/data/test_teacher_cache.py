"""TeacherCache: what went in comes out, and only a whole cache of this very text is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_moe.data.teacher_cache import TeacherCache
from lightning_moe.errors import InputError

WINDOWS, SEQ_LEN, CANDIDATES, VOCAB = 7, 5, 4, 11


def cache_in(folder: Path, fingerprint: str = "abc", windows: int = WINDOWS) -> TeacherCache:
    return TeacherCache(folder, windows, SEQ_LEN, CANDIDATES, fingerprint)


def logits_of(window_B: Tensor) -> Tensor:
    """Logits that each window has of its own, ``(B, S, V)``."""
    return torch.stack(
        [torch.randn(SEQ_LEN, VOCAB, generator=torch.Generator().manual_seed(100 + int(w))) for w in window_B]
    )


def expected(window_B: Tensor) -> tuple[Tensor, Tensor]:
    """Slowly: the largest logits of each place, and their share of all, one by one."""
    ids, values = [], []
    for logits_SV in logits_of(window_B):
        for logits_V in logits_SV.tolist():
            order = sorted(range(VOCAB), key=lambda token: -logits_V[token])[:CANDIDATES]
            total = torch.tensor(logits_V, dtype=torch.float64).exp().sum()
            ids.append(order)
            values.append([float(logits_V[token] - total.log()) for token in order])
    shape = (len(window_B), SEQ_LEN, CANDIDATES)
    return torch.tensor(ids).view(shape), torch.tensor(values).view(shape)


def filled(cache: TeacherCache, *batches: list[int]) -> TeacherCache:
    cache.create()
    for batch in batches:
        window_B = torch.tensor(batch)
        cache.write(window_B, logits_of(window_B))
    return cache


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """In any order, by another process, within what 16 bits hold."""
    cache = filled(cache_in(tmp_path / "cache"), [3, 1], [0, 2], [6, 5, 4])
    cache.finish()
    for asked in (torch.tensor([4, 0, 3]), torch.arange(WINDOWS), torch.tensor([2])):
        ids_BSC, values_BSC = cache_in(tmp_path / "cache").read(asked)
        want_ids_BSC, want_BSC = expected(asked)
        assert ids_BSC.dtype == torch.long and values_BSC.dtype == torch.float32
        assert torch.equal(ids_BSC, want_ids_BSC)
        torch.testing.assert_close(values_BSC, want_BSC, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """The logarithms are taken in 32 bits."""
    cache, window_B = cache_in(tmp_path), torch.arange(WINDOWS)
    cache.create()
    logits_BSV = logits_of(window_B).to(dtype)
    cache.write(window_B, logits_BSV)
    top = logits_BSV.float().log_softmax(-1).topk(CANDIDATES)
    torch.testing.assert_close(cache.read(window_B)[1], top.values, rtol=2**-10, atol=2**-10)


def test_blank_windows_are_left_out(tmp_path: Path) -> None:
    """They write nothing, neither at their own place nor at the last (index -1); reading them does not fail."""
    cache = filled(cache_in(tmp_path), [WINDOWS - 1, 0])
    before = [tensor.clone() for tensor in cache.read(torch.arange(WINDOWS))]
    cache.write(torch.tensor([-1, 1, -1]), logits_of(torch.tensor([50, 1, 51])))
    after = cache.read(torch.arange(WINDOWS))
    others = [window for window in range(WINDOWS) if window != 1]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[others], other[others])
    assert torch.equal(after[0][1], expected(torch.tensor([1]))[0][0])
    ids_BSC, values_BSC = cache.read(torch.tensor([-1, 1]))
    assert ids_BSC.shape == values_BSC.shape == (2, SEQ_LEN, CANDIDATES)
    assert values_BSC.isfinite().all() and int(ids_BSC.min()) >= 0


def test_a_cache_is_complete_once_it_is_stamped(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache")
    assert not cache.complete
    filled(cache, [0, 1, 2, 3])
    assert not cache.complete and not cache_in(tmp_path / "cache").complete
    cache.write(torch.tensor([4, 5, 6]), logits_of(torch.tensor([4, 5, 6])))
    cache.finish()
    assert cache.complete and cache_in(tmp_path / "cache").complete


def test_another_text_is_refused(tmp_path: Path) -> None:
    filled(cache_in(tmp_path / "cache"), list(range(WINDOWS))).finish()
    for other in (cache_in(tmp_path / "cache", "other"), cache_in(tmp_path / "cache", windows=WINDOWS + 1)):
        with pytest.raises(InputError, match="another text") as refused:
            _ = other.complete
        assert len(str(refused.value).splitlines()) == 1 and str(tmp_path / "cache") in str(refused.value)


def test_six_bytes_a_candidate(tmp_path: Path) -> None:
    filled(cache_in(tmp_path), list(range(WINDOWS))).finish()
    size = sum(file.stat().st_size for file in tmp_path.glob("*.npy"))
    assert size == 6 * WINDOWS * SEQ_LEN * CANDIDATES + 2 * 128  # and two headers
