"""Text files as domains: one file is one domain, a list of documents."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_moe.errors import InputError, first_line
from lightning_moe.files import looks_local

DOCUMENT_SEPARATOR = "\n\n\n"
"""Two blank lines separate the documents of a ``.txt`` file."""

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True)
class Domain:
    """The documents of one file (or one dataset), under the file's name."""

    name: str
    documents: list[str]


def text_files(location: Path) -> list[Path]:
    """The text files under a folder, by name."""
    return sorted(file for file in location.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())


def count_domains(path: str) -> int:
    """How many domains ``read_domains`` will yield, without reading them."""
    location = Path(path)
    return len(text_files(location)) if location.is_dir() else 1


def content_fingerprint(path: str) -> str | None:
    """Of the names and the content of the files under ``path``; None for the name of a dataset."""
    location = Path(path)
    if not location.exists():
        return None
    digest = hashlib.sha256()
    for file in text_files(location) if location.is_dir() else [location]:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(location)} {content}".encode())
    return digest.hexdigest()[:16]


def read_domains(path: str, *, subset: str | None = None, split: str = "validation") -> Iterator[Domain]:
    """Yield the domains under ``path``, in the order of their names, one in memory at a time.

    ``path`` is a file or folder of ``.txt``, ``.jsonl`` (plain or gzip) and ``.parquet`` files, or the name of
    a dataset that the ``datasets`` library can load. Raises ``InputError`` when nothing can be read.
    """
    location = Path(path)
    if location.is_file():
        yield _read_file(location, location.name)
    elif location.is_dir():
        files = text_files(location)
        if not files:
            raise InputError(f"{path}: no text found; expected files ending in {', '.join(SUFFIXES)}.")
        for file in files:
            yield _read_file(file, file.relative_to(location).as_posix())
    elif looks_local(path) or path.endswith(SUFFIXES):
        raise InputError(f"{path}: no such file or folder.")
    else:
        yield _load_dataset(path, subset, split)


def _read_file(file: Path, name: str) -> Domain:
    suffix = next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)
    if suffix is None:
        raise InputError(f"{file}: unknown kind of text; expected a file ending in {', '.join(SUFFIXES)}.")
    try:
        if suffix == ".txt":
            documents = file.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        elif suffix == ".parquet":
            documents = _read_parquet(file)
        else:
            documents = _read_json_lines(file)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{file}: not a whole gzip file ({first_line(error)}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it first.") from error
    return Domain(name.removesuffix(suffix), [document for document in documents if document.strip()])


def _read_json_lines(file: Path) -> list[str]:
    opener = gzip.open if file.name.endswith(".gz") else open
    documents = []
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number}: not JSON ({error.msg}).") from error
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise InputError(f"{file}, line {number}: no 'text' field; each line must hold {{\"text\": ...}}.")
            documents.append(text)
    return documents


def _read_parquet(file: Path) -> list[str]:
    from pyarrow import ArrowInvalid, parquet, types

    try:
        columns = parquet.read_schema(file).names
        if "text" not in columns:
            raise InputError(f"{file}: no 'text' column; it has {', '.join(columns)}.")
        kind = parquet.read_schema(file).field("text").type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise InputError(f"{file}: its 'text' column holds {kind}, not text.")
        rows: list[str | None] = parquet.read_table(file, columns=["text"])["text"].to_pylist()
    except ArrowInvalid as error:
        raise InputError(f"{file}: not a parquet file ({error}).") from error
    return [row for row in rows if row]


def _load_dataset(name: str, subset: str | None, split: str) -> Domain:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many kinds; each means the same to the user
        raise InputError(
            f"{name}: no such file or folder, and `datasets` cannot load it as a dataset (split {split!r}): "
            f"{first_line(error)}"
        ) from error
    if "text" not in rows.column_names:
        raise InputError(f"{name}: the dataset has no 'text' column; it has {', '.join(rows.column_names)}.")
    return Domain(name.replace("/", "_"), list(rows["text"]))
