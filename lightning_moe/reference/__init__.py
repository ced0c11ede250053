"""The bundled reference models: two small MoEs trained on six domains, their tokenizer, text and licences."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
"""A Mixtral, 8 experts and top-2, as a Hugging Face folder: weights in bf16, config, tokenizer."""

FINE_GRAINED = FOLDER / "fine_grained"
"""A Qwen2-MoE, 16 small experts, top-4, and a shared one, on the same text with the same tokenizer."""

TEXT = FOLDER / "text"
"""``calibration`` and ``validation``, each with one file a domain; neither was trained on."""
