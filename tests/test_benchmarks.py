"""The benchmarks run and print their line; what they measure is read by people, never asserted."""

from __future__ import annotations

import re

import pytest

from benchmarks import gates, naee, prune_save
from benchmarks.__main__ import BENCHMARKS
from benchmarks.ratios import median_ratio

QUICK = [gates, naee, prune_save]
LONG = [pytest.param(one, marks=pytest.mark.scale) for one in BENCHMARKS if one not in QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [*QUICK, *LONG])
def test_prints_name_ratio_and_goal(benchmark: object, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(repeats=1)  # type: ignore[attr-defined]
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.fullmatch(r"[\w-]+ ratio=\d+\.\d{3} goal=\d+\.\d{2}", line) for line in lines)


def test_ratio_of_equal_work_by_call_count() -> None:
    calls: list[str] = []
    median_ratio(lambda: calls.append("ours"), lambda: calls.append("floor"), repeats=4, warmup=1)
    assert calls.count("ours") == calls.count("floor") == 5
    assert calls[2:4] != calls[4:6]  # they take turns at going first
