"""Loading and saving: the only code that knows how a model lies on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.files import replaced_folder


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal language model from a folder or hub id.

    Raises ``InputError`` when the place does not exist or holds no model that transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError) as error:
        if not Path(path).exists() and path.startswith((".", "/", "~")):
            raise InputError(f"--model.path {path}: no such folder.") from error
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model.path {path}: no model could be loaded from there: {reason}") from error
    return model


def save_model(model: PreTrainedModel, target: Path, tokenizer: str | None = None, dtype: str | None = None) -> None:
    """Write ``model`` (and the tokenizer found at ``tokenizer``) to ``target``, beside it first, then renamed."""
    import copy

    from transformers import AutoTokenizer

    with replaced_folder(target) as folder:
        if dtype is not None:
            model = copy.deepcopy(model).to(getattr(torch, dtype))
            model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(folder)
        if tokenizer is not None:
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
