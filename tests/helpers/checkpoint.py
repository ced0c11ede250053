"""A tiny Mixtral with a tokenizer of its own on disk, text to go with it, and the commands run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lightning_moe.cli.main import main
from tests.helpers.families import tiny_model

VOCAB = 320

SENTENCES = [
    "The experts of a mixture each see their own share of the tokens.",
    "A router picks two of eight experts for every token it is shown.",
    "What nobody uses can be dropped, and nobody will miss it.",
    "Rain fell on the quiet town, and the river rose by a hand.",
    "She counted seven boats, nine gulls and one very small dog.",
    "def add(left, right): return left + right  # as plain as can be",
]


@dataclass(frozen=True)
class Result:
    """What one command said, and how it left."""

    code: int
    out: str
    err: str


class Commands:
    """Runs ``lightning-moe`` in this process: much faster than one process per command."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: object) -> Result:
        self._capsys.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = self._capsys.readouterr()
        return Result(code, said.out, said.err)

    def ok(self, *args: object) -> Result:
        result = self(*args)
        assert result.code == 0, result.err
        return result


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE with ids 0, 1, 2 for padding, start and end; it puts no start token before text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_checkpoint(folder: Path, family: str = "mixtral", **overrides: Any) -> Path:
    """A tiny random model of ``family`` and the tokenizer, in one folder."""
    tiny_model(family, vocab_size=VOCAB, **overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def edited_copy(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in its config."""
    shutil.copytree(source, target)
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def damaged_copy(source: Path, target: Path, part: str = "down_proj") -> Path:
    """A copy of a checkpoint with one weight that is not a number."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    name = next((name for name in tensors if part in name), next(name for name in tensors if ".experts." in name))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def documents(count: int, start: int = 0) -> list[str]:
    """Documents of a few sentences, each one different."""
    return [
        " ".join(SENTENCES[(number * 5 + turn * 7) % len(SENTENCES)] for turn in range(1 + number % 4)) + f" {number}."
        for number in range(start, start + count)
    ]


def write_text(file: Path, docs: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n\n".join(docs), encoding="utf-8")
    return file


def read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its size and time of change: equal before and after means untouched."""
    if not folder.exists():
        return {}
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
