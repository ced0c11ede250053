"""Windows: no token is lost, what is picked is spread over everything, the same text gives the same windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moe.data.packing import CHARS_PER_TOKEN, PackedText, pack
from lightning_moe.data.text import Domain
from lightning_moe.errors import InputError

EOS, BOS, PAD = 1, 2, 0
FIRST_CHARACTER = 3


class CharacterTokenizer:
    """Every character is a token, so that positions in tokens and in text are the same."""

    def __init__(self, bos: bool = False, eos: bool = True, pad: bool = True) -> None:
        self.bos = bos
        self.eos_token_id = EOS if eos else None
        self.pad_token_id = PAD if pad else None
        self.characters = 0

    def __call__(self, batch: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        assert add_special_tokens
        self.characters += sum(map(len, batch))
        start = [BOS] if self.bos else []
        return {"input_ids": [start + [ord(c) + FIRST_CHARACTER for c in document] for document in batch]}


def ids(text: str) -> list[int]:
    return [ord(character) + FIRST_CHARACTER for character in text]


def numbered(length: int) -> str:
    """Text whose every character says where it stands."""
    return "".join(chr(1000 + position) for position in range(length))


def position(token: int) -> int:
    return token - 1000 - FIRST_CHARACTER


def unpack(text: PackedText, domain: int) -> list[int]:
    """All real tokens of a domain, one after the other."""
    stream: list[int] = []
    for row in range(len(text)):
        if text.domain_N[row] == domain:
            stream += text.tokens_NS[row, : int(text.lengths_N[row])].tolist()
    return stream


corpora = st.lists(
    st.lists(st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=40), max_size=6),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(corpora, st.integers(2, 17), st.booleans(), st.booleans())
def test_nothing_is_lost(corpus: list[list[str]], seq_len: int, bos: bool, eos: bool) -> None:
    """All windows of a domain in their order are its documents, each with its start and end token."""
    domains = [Domain(f"d{number}", documents) for number, documents in enumerate(corpus)]
    start, end = ([BOS] if bos else []), ([EOS] if eos else [])
    expected = [[i for document in d.documents for i in start + ids(document) + end] for d in domains]
    if sum(map(len, expected)) < 2:
        return
    text = pack(domains, CharacterTokenizer(bos, eos), seq_len, None)
    assert text.domains == tuple(d.name for d in domains)
    for number, stream in enumerate(expected):
        if len(stream) > seq_len and len(stream) % seq_len == 1:
            stream = stream[:-1]  # a window of one token would predict nothing
        assert unpack(text, number) == stream
        lengths = text.lengths_N[text.domain_N == number].tolist()
        assert all(length == seq_len for length in lengths[:-1])
    assert text.num_tokens == int(text.lengths_N.sum())


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(1, 12), st.integers(2, 400))
def test_few_of_short_text_are_spread_evenly(seq_len: int, samples: int, length: int) -> None:
    """One window from each of ``samples`` equal stretches, or all there are."""
    domain = [Domain("d", [numbered(length)])]
    everything = pack(domain, CharacterTokenizer(eos=False), seq_len, None)
    text = pack(domain, CharacterTokenizer(eos=False), seq_len, samples)
    assert len(text) == min(samples, len(everything))
    if len(everything) <= samples:
        assert torch.equal(text.tokens_NS, everything.tokens_NS)
        return
    for turn, row in enumerate(text.tokens_NS):
        place = position(int(row[0]))
        assert length * turn < (place + seq_len) * samples
        assert place * samples < length * (turn + 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 300), st.integers(1, 30))
def test_long_text_is_read_in_every_stretch(seq_len: int, samples: int, extra: int, documents: int) -> None:
    """From each of ``samples`` equal stretches one full window, and little more is tokenized."""
    total = samples * seq_len * CHARS_PER_TOKEN + extra
    stream = numbered(total)
    size = -(-total // documents)
    domain = Domain("d", [stream[start : start + size] for start in range(0, total, size)])
    tokenizer = CharacterTokenizer(eos=False)
    text = pack([domain], tokenizer, seq_len, samples)
    assert text.lengths_N.tolist() == [seq_len] * samples
    assert tokenizer.characters <= samples * seq_len * CHARS_PER_TOKEN
    for turn, row in enumerate(text.tokens_NS.tolist()):
        places = [position(token) for token in row]
        assert places == list(range(places[0], places[0] + seq_len))
        assert total * turn <= places[0] * samples + samples - 1
        assert places[0] * samples < total * (turn + 1)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_long_text_is_not_read_from_its_head(samples: int) -> None:
    """The windows of many files with one window each must not all be titles and licences: stretches have middles."""
    total, seq_len = 20_000, 4
    text = pack([Domain("d", [numbered(total)])], CharacterTokenizer(eos=False), seq_len, samples)
    places = [position(int(row[0])) for row in text.tokens_NS]
    assert places[0] > 0
    assert sum(places) / samples == pytest.approx(total / 2, rel=0.1)


def test_documents_end_inside_a_sampled_window() -> None:
    seq_len, samples = 8, 2
    documents = ["abc"] * (samples * seq_len * CHARS_PER_TOKEN)
    text = pack([Domain("d", documents)], CharacterTokenizer(), seq_len, samples)
    for row in text.tokens_NS.tolist():
        assert row.count(EOS) >= 1
        assert set(row) <= {EOS, *ids("abc")}


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 40))
def test_domains_share_the_samples_evenly(num_domains: int, samples: int) -> None:
    domains = [Domain(f"d{number}", [numbered(3000)]) for number in range(num_domains)]
    text = pack(domains, CharacterTokenizer(), 4, samples)
    counts = [int((text.domain_N == number).sum()) for number in range(num_domains)]
    assert sum(counts) == samples
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("num_domains", "samples"), [(10, 5), (9, 3), (100, 7)])
def test_more_domains_than_samples(num_domains: int, samples: int) -> None:
    """Never the head: the domains that get a window are spread over all of them."""
    domains = [Domain(f"d{number}", [numbered(300)]) for number in range(num_domains)]
    text = pack(domains, CharacterTokenizer(), 4, samples)
    stretches = {int(domain) * samples // num_domains for domain in text.domain_N}
    assert stretches == set(range(samples))


def test_a_generator_of_domains_is_fine() -> None:
    domains = [Domain(f"d{number}", [numbered(300)]) for number in range(3)]
    lists, lazily = (pack(given, CharacterTokenizer(), 4, 5) for given in (domains, iter(domains)))
    named = pack(iter(domains), CharacterTokenizer(), 4, 5, num_domains=3)
    assert lists.fingerprint == lazily.fingerprint == named.fingerprint


def test_items_mask_what_is_no_text() -> None:
    text = pack([Domain("a", ["abcde"]), Domain("b", ["xy"])], CharacterTokenizer(), 4, None)
    masks = [text[row]["attention_mask"].tolist() for row in range(len(text))]
    assert masks == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert [int(text[row]["domain"]) for row in range(len(text))] == [0, 0, 1]
    for row in range(len(text)):
        item = text[row]
        assert item["input_ids"].dtype == torch.long
        assert (item["input_ids"][item["attention_mask"] == 0] == PAD).all()


def test_blank_window() -> None:
    text = pack([Domain("a", ["abcde"])], CharacterTokenizer(), 4, None)
    assert text[-1]["attention_mask"].tolist() == [0, 0, 0, 0]
    assert text[-1]["input_ids"].shape == (4,)


@pytest.mark.parametrize(("eos", "pad", "padding"), [(True, True, PAD), (True, False, EOS), (False, False, 0)])
def test_any_tokenizer_can_pad(eos: bool, pad: bool, padding: int) -> None:
    text = pack([Domain("a", ["ab"])], CharacterTokenizer(eos=eos, pad=pad), 9, None)
    assert int(text.tokens_NS[0, -1]) == padding


def test_an_end_token_is_not_doubled() -> None:
    class EndsItself(CharacterTokenizer):
        def __call__(self, batch: list[str], **kwargs: Any) -> dict[str, Any]:
            return {"input_ids": [ids(document) + [EOS] for document in batch]}

    text = pack([Domain("a", ["ab", "cd"])], EndsItself(), 16, None)
    assert unpack(text, 0) == [*ids("ab"), EOS, *ids("cd"), EOS]


def test_same_text_same_windows() -> None:
    def fingerprint(documents: Sequence[str], name: str = "d", seq_len: int = 8, samples: int | None = 3) -> str:
        return pack([Domain(name, list(documents))], CharacterTokenizer(), seq_len, samples).fingerprint

    documents = [numbered(500), "short", numbered(90)]
    assert fingerprint(documents) == fingerprint(documents)
    others = {
        fingerprint(documents[::-1]),
        fingerprint(documents, name="e"),
        fingerprint(documents, seq_len=7),
        fingerprint(documents, samples=4),
        fingerprint([*documents[:2], numbered(91)], samples=None),
        fingerprint(documents, samples=None),
    }
    assert len(others | {fingerprint(documents)}) == 7


@pytest.mark.parametrize("corpus", [[], [[]], [["a"]]])
def test_too_little_text(corpus: list[list[str]]) -> None:
    domains = [Domain(f"d{number}", documents) for number, documents in enumerate(corpus)]
    with pytest.raises(InputError, match="too little text"):
        pack(domains, CharacterTokenizer(eos=False), 4, 8)
