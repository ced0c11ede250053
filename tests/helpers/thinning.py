"""Cases of a law in plenty: some for every run of the tests, all of them for ``make test-scale``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], keep: int) -> list[Any]:
    """Every ``keep``-th case, from the first on, as it is; the others marked ``scale``."""
    marked = []
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=[pytest.mark.scale] if place % keep else []))
    return marked
