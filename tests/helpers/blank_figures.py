"""Figures that are saved and not drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image


@contextmanager
def blank_figures() -> Iterator[None]:
    """Drawing takes longer than all else a tiny command does."""
    png = BytesIO()
    Image.new("L", (8, 8)).save(png, format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **settings: Path(file).write_bytes(png.getvalue()))
        yield
