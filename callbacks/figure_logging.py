"""Figures to loggers and to files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger

from lightning_moe.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def save_figure(file: Path, figure: Figure) -> None:
    """Write a PNG."""
    with replaced_file(file) as beside:
        figure.savefig(beside, format="png", dpi=DPI)


def log_figure(logger: Logger, key: str, figure: Figure, step: int) -> None:
    """Hand a figure to a logger that takes one, in the form that it takes."""
    if hasattr(logger, "log_image"):
        from PIL import Image

        png = BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        logger.log_image(key=key, images=[np.array(Image.open(png).convert("RGB"))], step=step)
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(key, figure, global_step=step)
