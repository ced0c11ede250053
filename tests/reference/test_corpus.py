"""The reference corpus: page text, cleaning, repeats and the split by document."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_moe.reference import corpus
from lightning_moe.reference.page_text import page_text
from lightning_moe.reference.sources import DOMAINS, Package
from lightning_moe.reference.tokenizer import train

PAGE = """<html><head><title>Hidden title</title><style>p {}</style></head><body>
<div class="related"><ul><li><a href="x">next</a></li></ul></div>
<h1>The loop<a class="headerlink" href="#loop">\u00b6</a></h1>
<p>A <code>for</code> loop
   visits   every item, 1 &lt; 2.</p>
<pre>for item in items:
    print(item)

    visit(item)
</pre>
<ul><li><p>First.</p></li><li>Second.</li></ul>
<table><tr><th>Name</th><th>Meaning</th></tr><tr><td>a</td><td><p>one</p></td></tr></table>
<div class="navfooter"><hr/>Prev<br>Home</div><p>The end.</p></body></html>"""


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Return invented documents, each of about 6 kB and with its own words."""
    chance = random.Random(seed)
    return [
        "\n\n".join(
            f"Document {number} paragraph {part}: " + " ".join(str(chance.random()) for _ in range(30))
            for part in range(10)
        )
        for number in range(count)
    ]


def test_page_text_keeps_prose_and_code_and_drops_navigation() -> None:
    text = corpus.clean(page_text(PAGE))
    assert text.split("\n\n") == [
        "The loop",
        "A for loop visits every item, 1 < 2.",
        "for item in items:\n    print(item)",
        "    visit(item)",
        "- First.",
        "- Second.",
        "Name | Meaning\na | one",
        "The end.",
    ]


def test_clean_makes_punctuation_ascii_and_collapses_blank_lines() -> None:
    assert corpus.clean("\u201cYes\u201d \u2014 it\u2019s  \n\n\n\nso\u2026\n") == '"Yes" -- it\'s\n\nso...'


def test_clean_drops_paragraphs_in_another_script() -> None:
    kept = "kept \u00e9 " + "a" * 40
    assert corpus.clean(f"{kept}\n\n\u4e2d\u6587\u4e2d\u6587") == kept


def test_clean_never_leaves_the_separator_inside_a_document() -> None:
    assert corpus.SEPARATOR not in corpus.clean("def a(): ...\n \n\t\n\n\n\ndef b(): ...")


def test_distinct_keeps_the_first_long_passage_and_every_short_one() -> None:
    long, other = "x" * 81, "y" * 100
    seen: set[str] = set()
    assert corpus.distinct(f"{long}\n\nshort", seen) == f"{long}\n\nshort"
    assert corpus.distinct(f"short\n\n{long}\n\n{other}", seen) == f"short\n\n{other}"
    assert corpus.distinct(f"{other}\nnew line", seen) == "new line"


def test_excerpt_ends_at_a_line_within_the_limit() -> None:
    assert corpus.excerpt("one\ntwo\n\nthree", 9) == "one\ntwo"
    assert corpus.excerpt("\u00e9\u00e9\u00e9\u00e9", 6) == ""


def test_split_fills_every_part_to_its_size() -> None:
    parts = corpus.split(documents(), set(), train_bytes=100_000)
    sizes = {name: len(corpus.SEPARATOR.join(chosen).encode()) for name, chosen in parts.items()}
    assert 75_000 < sizes["validation"] <= 80_000
    assert 55_000 < sizes["calibration"] <= 60_000
    assert 95_000 < sizes["train"] <= 100_000


def test_split_shares_no_document_and_no_passage_between_parts() -> None:
    copied = "This paragraph stands in every document and is longer than the shortest passage compared. " * 2
    parts = corpus.split([f"{text}\n\n{copied}" for text in documents()], set(), train_bytes=100_000)
    heads = [chosen.split(" paragraph ")[0] for part in parts.values() for chosen in part]
    assert len(heads) == len(set(heads))
    passages = [
        paragraph
        for part in parts.values()
        for document in part
        for paragraph in document.split("\n\n")
        if len(paragraph) > corpus.PASSAGE
    ]
    assert len(passages) == len(set(passages))


def test_split_depends_only_on_the_documents_and_the_seed() -> None:
    texts = ["", *documents()]
    first = corpus.split(texts, set(), train_bytes=50_000)
    assert first == corpus.split(list(reversed(texts)), set(), train_bytes=50_000)
    assert first != corpus.split(texts, set(), train_bytes=50_000, seed=corpus.SEED + 1)


def test_split_does_not_use_up_documents_whose_first_line_is_too_long() -> None:
    parts = corpus.split([f"{number} " + "z" * 9_000 for number in range(40)], set(), train_bytes=50_000)
    assert all(parts.values())


def test_withdraw_drops_a_paragraph_that_train_shows_inside_a_longer_one() -> None:
    example = "SELECT name, population FROM cities WHERE population > 100000 ORDER BY population, name;"
    kept = corpus.withdraw([f"An example:\n\n{example}\n\nshort", example], [f"BEGIN;\n{example}\nCOMMIT;"])
    assert kept == ["An example:\n\nshort"]


def test_every_domain_is_pinned_and_licensed() -> None:
    packages = [package for _, used in DOMAINS.values() for package in used]
    assert len(DOMAINS) == 6
    assert all(package.version and package.licence for package in packages)


def test_build_writes_the_files_that_sources_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(root: Path) -> Iterator[str]:
        yield from documents()

    package = Package("npm", "invented", "1.0", "CC0-1.0", read)
    monkeypatch.setattr(corpus, "DOMAINS", {"numbers": (100_000, (package,))})
    monkeypatch.setattr(corpus, "fetch", lambda package, cache, target: None)
    corpus.build(tmp_path / "first", tmp_path)
    corpus.build(tmp_path / "second", tmp_path)
    sources = json.loads((tmp_path / "first/SOURCES.json").read_text("utf-8"))
    for name, file in sources["numbers"]["files"].items():
        data = (tmp_path / "first" / name / "numbers.txt").read_bytes()
        assert len(data) == file["bytes"]
        assert len(data.decode().split(corpus.SEPARATOR)) == file["documents"]
        assert data == (tmp_path / "second" / name / "numbers.txt").read_bytes()


def test_tokenizer_prepends_bos_and_decodes_to_the_same_text(tmp_path: Path) -> None:
    train(iter(["a few words, and some more words\n"] * 20), vocabulary=270).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == 270
    for text in ("", " words  and\n\t more ,", "caf\u00e9 \U0001f600 1999", "(?P<s>x)</s>"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0 and 0 not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
