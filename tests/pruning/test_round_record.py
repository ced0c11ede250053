"""A record of a round is a line of JSON: it comes back as it was, and what is no such line is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.pruning.round_record import (
    MOMENTS,
    VERSION,
    RoundRecord,
    dropped_ids,
    read_records,
    scores_by_id,
    write_records,
)

LAYER = "model.layers.0.mlp"


def moments(*names: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Perplexity 10, 20, ... and a load for each moment."""
    return {
        "perplexity": {name: {"all": 10.0 * (1 + MOMENTS.index(name)), "domains": {"tales": 9.5}} for name in names},
        "load": {name: {"mean": {"cv": float(MOMENTS.index(name))}, LAYER: {"counts": [3.0, 1.0]}} for name in names},
    }


RECORDS = [
    RoundRecord(1, 0.25, "reap", {LAYER: [0, 2, 3]}, {LAYER: [1]}, {LAYER: {"0": 1.5, "1": 0.1, "2": 1 / 3, "3": 2.0}}),
    RoundRecord(
        2,
        0.5,
        "reap",
        {LAYER: [0, 3]},
        {LAYER: [2]},
        {LAYER: {"0": 1.0, "2": 0.5, "3": 1e-30}},
        **moments(*MOMENTS),
        seconds={"estimate": 0.25},
        tokens=1024,
        steps=2,
        lr=1e-4,
        parameters=12345,
        made_by={"scope": "layer", "text": "Gedränge\u2028\nand more"},
    ),
]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rounds.jsonl"
    for count in (1, 2):
        write_records(file, RECORDS[:count])
        assert read_records(file) == RECORDS[:count]
        assert [json.loads(line)["round"] for line in file.read_text().splitlines()] == [1, 2][:count]
    write_records(tmp_path / "again.jsonl", read_records(file))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["again.jsonl", "new", "rounds.jsonl"]


def test_no_file_and_no_line_are_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "rounds.jsonl") == []
    write_records(tmp_path / "rounds.jsonl", [])
    assert read_records(tmp_path / "rounds.jsonl") == []


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    """JSON has no NaN; what was there stays."""
    write_records(tmp_path / "rounds.jsonl", RECORDS)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_records(tmp_path / "rounds.jsonl", [replace(RECORDS[0], lr=float("nan"))])
    assert read_records(tmp_path / "rounds.jsonl") == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.jsonl"]


GOOD = json.dumps(asdict(RECORDS[0]))
REFUSED = {
    "newer": (json.dumps(asdict(RECORDS[0]) | {"version": VERSION + 1}), f"version {VERSION + 1}"),
    "version in words": (json.dumps(asdict(RECORDS[0]) | {"version": "one"}), "version one"),
    "no version": (json.dumps({name: value for name, value in asdict(RECORDS[0]).items() if name != "version"}), "1"),
    "not JSON": ("{round: 1}", "line 1"),
    "cut short": (f"{GOOD}\n{GOOD[:50]}", "line 2"),
    "an empty line": (f"{GOOD}\n\n{GOOD}", "line 2"),
    "a list": (f"{GOOD}\n[1, 2]", "line 2"),
    "a number": ("3", "line 1"),
    "null": ("null", "line 1"),
    "words": ('"version"', "line 1"),
    "too little": (json.dumps({"version": VERSION, "round": 1}), "line 1"),
    "too much": (json.dumps(asdict(RECORDS[0]) | {"colour": "red"}), "colour"),
    "an image": (b"\x89PNG\r\n\x1a\n\xff\xfe", "line 1"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_record_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    content, said = REFUSED[fault]
    file = tmp_path / "rounds.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as refused:
        read_records(file)
    message = str(refused.value)
    assert "\n" not in message and str(file) in message and said in message, message


@pytest.mark.parametrize("count", range(4))
def test_the_last_moment_is_the_last_that_was_measured(count: int) -> None:
    record = replace(RECORDS[0], **moments(*MOMENTS[:count]))
    if not count:
        assert (record.last_moment, record.final_perplexity, record.final_load) == (None, None, {})
        return
    assert record.last_moment == MOMENTS[count - 1]
    assert record.final_perplexity == 10.0 * count
    assert record.final_load["mean"]["cv"] == count - 1


def test_the_order_of_the_moments_is_that_of_the_round() -> None:
    assert replace(RECORDS[0], **moments(*reversed(MOMENTS))).last_moment == "after_finetune"
    assert replace(RECORDS[0], **moments("after_finetune", "before_prune")).final_perplexity == 30.0


def test_scores_by_id_by_hand() -> None:
    before = {"a": [1, 4, 6], "b": [0, 2]}
    assert scores_by_id({"a": [0.5, 0.25, 1.0]}, before) == {"a": {"1": 0.5, "4": 0.25, "6": 1.0}}
    assert scores_by_id({}, before) == {}
    with pytest.raises(ValueError):
        scores_by_id({"b": [0.5, 0.25, 1.0]}, before)


ids = st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 9)).map(sorted), min_size=1)


@given(before=ids, data=st.data())
def test_what_was_there_is_kept_or_dropped(before: dict[str, list[int]], data: st.DataObject) -> None:
    after = {
        name: sorted(data.draw(st.sets(st.sampled_from(was)) if was else st.just(set())))
        for name, was in before.items()
    }
    gone = dropped_ids(before, after)
    assert {name: sorted(after[name] + gone[name]) for name in after} == before
    assert dropped_ids(before, before) == {name: [] for name in before}
