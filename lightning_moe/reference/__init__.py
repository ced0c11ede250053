"""The bundled reference model: a small Mixtral trained on six domains, its tokenizer, its text, its licences."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
"""A Hugging Face folder: weights in bf16, config, tokenizer."""

TEXT = FOLDER / "text"
"""``calibration`` and ``validation``, each with one file a domain; neither was trained on."""
