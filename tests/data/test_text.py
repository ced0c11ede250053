"""Reading text: every kind of file gives the same documents, folders are read by name, faults name their place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_moe.data.text import DOCUMENT_SEPARATOR, Domain, content_fingerprint, read_domains
from lightning_moe.errors import InputError

DOCUMENTS = [
    "First one.\nIt has two lines.",
    "Second, with \u00fcml\u00e4uts and \u4e2d\u6587.",
    "Third.\n\nA blank line is no end.",
]


def txt(file: Path, documents: Sequence[str]) -> None:
    file.write_text(DOCUMENT_SEPARATOR.join(documents), encoding="utf-8")


def as_lines(documents: Sequence[str]) -> str:
    return "".join(json.dumps({"text": document, "id": 1}) + "\n" for document in documents)


def jsonl(file: Path, documents: Sequence[str]) -> None:
    file.write_text(as_lines(documents), encoding="utf-8")


def jsonl_gz(file: Path, documents: Sequence[str]) -> None:
    file.write_bytes(gzip.compress(as_lines(documents).encode()))


def table(file: Path, documents: Sequence[str]) -> None:
    parquet.write_table(pyarrow.table({"id": list(range(len(documents))), "text": list(documents)}), file)


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    ".txt": txt,
    ".jsonl": jsonl,
    ".jsonl.gz": jsonl_gz,
    ".json.gz": jsonl_gz,
    ".parquet": table,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"some.text{suffix}"
    WRITERS[suffix](file, DOCUMENTS)
    assert list(read_domains(str(file))) == [Domain("some.text", DOCUMENTS)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_blank_documents_are_left_out(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    WRITERS[suffix](file, ["One.", " \n ", "Two.", ""])
    assert next(read_domains(str(file))).documents == ["One.", "Two."]


def test_json_lines_may_be_plain_strings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"One."\n\n"Two."\n')
    assert next(read_domains(str(tmp_path / "a.jsonl"))).documents == ["One.", "Two."]


def test_folders_are_read_by_name_and_in_depth(tmp_path: Path) -> None:
    for number, (name, suffix) in enumerate(
        [("z", ".txt"), ("a", ".parquet"), ("deep/er/m", ".jsonl"), ("deep/b", ".jsonl.gz")]
    ):
        file = tmp_path / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[suffix](file, [f"Document {number}."])
    (tmp_path / "README.md").write_text("Not text of ours.")
    (tmp_path / "folder.txt").mkdir()
    assert [(d.name, d.documents) for d in read_domains(str(tmp_path))] == [
        ("a", ["Document 1."]),
        ("deep/b", ["Document 3."]),
        ("deep/er/m", ["Document 2."]),
        ("z", ["Document 0."]),
    ]


def test_one_domain_at_a_time(tmp_path: Path) -> None:
    """A folder larger than memory: the second file is not opened before it is asked for."""
    txt(tmp_path / "a.txt", ["One."])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    domains = read_domains(str(tmp_path))
    assert next(domains).name == "a"
    with pytest.raises(InputError, match="UTF-8"):
        next(domains)


class Rows(dict[str, list[str]]):
    """As much of a dataset as is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_a_datasets_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Rows:
        asked.append((name, subset, split))
        return Rows(text=DOCUMENTS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read_domains("allenai/c4", subset="en", split="train")) == [Domain("allenai_c4", DOCUMENTS)]
    assert asked == [("allenai/c4", "en", "train")]


def test_a_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Rows(body=["x"], label=["y"]))
    with pytest.raises(InputError, match="no 'text' column; it has body, label"):
        list(read_domains("wikitext"))


def test_a_dataset_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no network\nand much more\nto say")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError) as refused:
        list(read_domains("somebody/something"))
    assert "no network" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for path in (str(tmp_path / "no"), "./no", "../no/text", "no.txt", "a/b/c", "some/no.parquet"):
        with pytest.raises(InputError, match="no such file or folder"):
            list(read_domains(path))


def test_fingerprint_tells_texts_apart(tmp_path: Path) -> None:
    txt(tmp_path / "a.txt", DOCUMENTS)
    seen = {content_fingerprint(str(tmp_path / "a.txt")), content_fingerprint(str(tmp_path))}
    assert content_fingerprint(str(tmp_path)) == content_fingerprint(str(tmp_path))
    (tmp_path / "notes.md").write_text("no text of ours")
    assert content_fingerprint(str(tmp_path)) in seen
    for change in (
        lambda: txt(tmp_path / "b.txt", DOCUMENTS),
        lambda: txt(tmp_path / "b.txt", DOCUMENTS[:2]),
        lambda: (tmp_path / "b.txt").rename(tmp_path / "c.txt"),
        lambda: txt(tmp_path / "c.txt", [document.upper() for document in DOCUMENTS[:2]]),
    ):
        change()
        found = content_fingerprint(str(tmp_path))
        assert found not in seen
        seen.add(found)
    assert content_fingerprint("allenai/c4") is None
