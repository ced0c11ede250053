"""Text that no command can read, each refused in a line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.helpers.bad_input import Cases, Place, assert_refused
from tests.helpers.checkpoint import Commands

TEXTS: Cases = {
    "no text given": (lambda p: ["score", "--model.path", p.model, "--out", p.out], ["--data.path"]),
    "no text given, evaluate": (lambda p: ["evaluate", "--model.path", p.model, "--out", p.out], ["--data.path"]),
    "missing text": (lambda p: p.score("--data.path", p.tmp / "nowhere"), ["nowhere", "no such file"]),
    "missing text file": (lambda p: p.score("--data.path", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "no such dataset": (lambda p: p.score("--data.path", "nobody/no-dataset"), ["nobody/no-dataset"]),
    "empty text": (lambda p: p.score("--data.path", p.file("a.txt", "")), ["a.txt", "too little text"]),
    "blank text": (lambda p: p.evaluate("--data.path", p.file("a.txt", " \n\n\n\n ")), ["a.txt", "too little text"]),
    "too short text": (lambda p: p.prune("--data.path", p.file("a.jsonl", '{"text": ""}')), ["a.jsonl", "too little"]),
    "empty folder": (lambda p: p.score("--data.path", p.tmp), ["no text found", ".parquet"]),
    "unknown suffix": (lambda p: p.score("--data.path", p.file("a.doc", "Words.")), ["a.doc", ".txt"]),
    "no text field": (
        lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": "ok"}\n{"body": "no"}\n')),
        ["a.jsonl", "line 2", "text"],
    ),
    "text is a number": (lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": 3}\n')), ["line 1", "text"]),
    "broken line": (
        lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": "ok"}\n\n{"text": "no\n')),
        ["a.jsonl", "line 3", "not JSON"],
    ),
    "not UTF-8": (lambda p: p.score("--data.path", p.file("a.txt", b"caf\xe9 au lait")), ["a.txt", "UTF-8"]),
    "not UTF-8, jsonl": (lambda p: p.score("--data.path", p.file("a.jsonl", b'{"text": "\xe9"}')), ["UTF-8"]),
    "not gzip": (lambda p: p.score("--data.path", p.file("a.jsonl.gz", '{"text": "ok"}')), ["a.jsonl.gz"]),
    "gzip cut off": (
        lambda p: p.score("--data.path", p.file("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 999)[:60])),
        ["a.jsonl.gz"],
    ),
    "not parquet": (lambda p: p.score("--data.path", p.file("a.parquet", "PAR1 no")), ["a.parquet"]),
    "parquet without text": (lambda p: p.score("--data.path", parquet(p, body=["Words."])), ["text", "body"]),
    "parquet of numbers": (lambda p: p.score("--data.path", parquet(p, text=[1, 2, 3])), ["p.parquet"]),
}


def parquet(place: Place, **columns: list[object]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), place.tmp / "p.parquet")
    return place.tmp / "p.parquet"


@pytest.mark.parametrize("name", TEXTS)
def test_refused_in_one_line(run: Commands, place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run, place, *TEXTS[name], monkeypatch)


def test_windows_longer_than_the_model_knows_are_refused(place: Place, run: Commands) -> None:
    said = run(*place.evaluate("--data.seq_len", 100_000))
    assert said.code == 2 and "at most" in said.err and len(said.err.splitlines()) == 1
