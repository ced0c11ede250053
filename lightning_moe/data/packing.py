"""Documents to fixed windows of tokens."""

# N windows, S window length in tokens

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_moe.data.text import Domain
from lightning_moe.errors import InputError

CHARS_PER_TOKEN = 8
"""Upper end of what tokenizers reach on prose: this many characters nearly always fill a token's place."""

TOKENIZER_BATCH = 256
"""Documents tokenized at a time: enough for the tokenizer's threads, little memory."""


@dataclass(frozen=True)
class PackedText(Dataset[dict[str, Tensor]]):
    """Windows of packed tokens, each from one domain.

    ``tokens_NS`` int32; ``lengths_N`` real tokens per window (the last window of a domain may be shorter, the
    rest of it is padding); ``domain_N`` index into ``domains``.
    """

    tokens_NS: Tensor
    lengths_N: Tensor
    domain_N: Tensor
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return self.tokens_NS.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window; an index of -1 is a blank one, all padding, which evens out the ranks' batches."""
        blank = index < 0
        input_ids = self.tokens_NS[index].long()
        length = 0 if blank else int(self.lengths_N[index])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[0]) < length).long(),
            "domain": self.domain_N[index],
            "window": torch.tensor(index),
        }

    @property
    def num_tokens(self) -> int:
        return int(self.lengths_N.sum())

    @property
    def fingerprint(self) -> str:
        """Of what a model would see: the tokens, their lengths and the domains' names."""
        digest = hashlib.sha256(self.tokens_NS.numpy().tobytes())
        digest.update(self.lengths_N.numpy().tobytes())
        digest.update("\n".join(self.domains).encode())
        return digest.hexdigest()[:16]


def pack(
    domains: Iterable[Domain],
    tokenizer: Any,
    seq_len: int,
    samples: int | None,
    num_domains: int | None = None,
    source: str = "the documents",
) -> PackedText:
    """Pack each domain's documents into windows of ``seq_len`` tokens.

    With ``samples`` the windows are spread evenly over the domains and over each domain's whole length, and only
    what is needed is tokenized; ``num_domains`` then says how many domains share the samples. Raises
    ``InputError`` when there is too little text for one token to be predicted.
    """
    if samples is not None and num_domains is None:
        domains = list(domains)
        num_domains = len(domains)
    windows: list[list[int]] = []
    owner: list[int] = []
    names: list[str] = []
    for position, domain in enumerate(domains):
        names.append(domain.name)
        share = None if samples is None else _share(samples, num_domains or 1, position)
        found = _windows(domain.documents, tokenizer, seq_len, share)
        windows += found
        owner += [position] * len(found)
    num_tokens = sum(map(len, windows))
    if num_tokens < 2:
        raise InputError(f"{source}: too little text: {num_tokens} tokens; at least 2 are needed.")
    tokens_NS = torch.full((len(windows), seq_len), _padding(tokenizer), dtype=torch.int32)
    for row, window in zip(tokens_NS, windows, strict=True):
        row[: len(window)] = torch.tensor(window, dtype=torch.int32)
    return PackedText(tokens_NS, torch.tensor([len(window) for window in windows]), torch.tensor(owner), tuple(names))


def _share(samples: int, num_domains: int, position: int) -> int:
    """Samples of the domain at ``position``: equal shares, the remainder spread evenly over the domains."""
    return (position + 1) * samples // num_domains - position * samples // num_domains


def _windows(documents: Sequence[str], tokenizer: Any, seq_len: int, count: int | None) -> list[list[int]]:
    if count == 0:
        return []
    ends = list(accumulate(map(len, documents)))
    total, piece = (ends[-1] if ends else 0), seq_len * CHARS_PER_TOKEN
    if count is not None and total > count * piece:
        # Long text: read one piece in the middle of each of `count` equal stretches.
        starts = [(2 * i + 1) * total // (2 * count) - piece // 2 for i in range(count)]
        return [_tokenize(_piece(documents, ends, start, piece), tokenizer)[:seq_len] for start in starts]
    stream = _tokenize(documents, tokenizer)
    windows = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len)]
    if len(windows) > 1 and len(windows[-1]) < 2:
        windows.pop()  # a lone token predicts nothing
    if count is None or count >= len(windows):
        return windows
    return [windows[(2 * i + 1) * len(windows) // (2 * count)] for i in range(count)]


def _piece(documents: Sequence[str], ends: Sequence[int], start: int, length: int) -> list[str]:
    """The documents from character ``start`` on, until ``length`` characters are together."""
    index = bisect_right(ends, start)
    offset = start - (ends[index - 1] if index else 0)
    piece: list[str] = []
    while index < len(documents) and length > 0:
        text = documents[index][offset : offset + length]
        piece.append(text)
        length -= len(text)
        index, offset = index + 1, 0
    return piece


def _tokenize(documents: Sequence[str], tokenizer: Any) -> list[int]:
    """One stream: the tokenizer's own start token before, and its end token after each document."""
    stream: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for first in range(0, len(documents), TOKENIZER_BATCH):
        batch = list(documents[first : first + TOKENIZER_BATCH])
        for ids in tokenizer(batch, add_special_tokens=True, verbose=False)["input_ids"]:
            stream += ids if ids[-1:] == end else ids + end
    return stream


def _padding(tokenizer: Any) -> int:
    """Padding never counts, so any valid id serves when the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
