"""The data module: defaults, domains, the stages, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_moe.data.datamodule import TextDataModule, default_seq_len, longest_seq_len
from lightning_moe.data.loading import ResumableLoader
from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_tokenizer
from tests.helpers.checkpoint import documents, edited_copy, save_checkpoint, save_tokenizer, write_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text" / "a.txt", documents(20))
    write_text(tmp_path / "text" / "b.txt", documents(9, start=50))
    return tmp_path / "text"


@pytest.mark.parametrize(("maximum", "expected"), [(128, 128), (2048, 2048), (32768, 2048)])
def test_default_window(checkpoint: Path, tmp_path: Path, maximum: int, expected: int) -> None:
    folder = edited_copy(checkpoint, tmp_path / "model", max_position_embeddings=maximum)
    assert default_seq_len(longest_seq_len(str(folder)), load_tokenizer(str(folder))) == expected


def test_default_window_of_a_tokenizer_alone(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert longest_seq_len(str(tmp_path)) is None
    assert default_seq_len(None, load_tokenizer(str(tmp_path))) == 2048


def test_default_window_of_a_model_with_another_tokenizer(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """The model's maximum counts, wherever the tokenizer comes from."""
    from lightning_moe.cli.main import main

    save_tokenizer(tmp_path / "tokenizer")
    args = ["evaluate", "--model.path", checkpoint, "--data.path", text, "--data.tokenizer", tmp_path / "tokenizer"]
    main([str(arg) for arg in (*args, "--trainer.accelerator", "cpu", "--out", tmp_path / "out")])
    own = ["evaluate", "--model.path", checkpoint, "--data.path", text, "--trainer.accelerator", "cpu"]
    main([str(arg) for arg in (*own, "--out", tmp_path / "own")])
    found, expected = (json.loads((tmp_path / name / "evaluate.json").read_text()) for name in ("out", "own"))
    assert found["data_fingerprint"] == expected["data_fingerprint"]


def test_windows_are_text(checkpoint: Path, text: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=None)
    tokenizer: Any = load_tokenizer(str(checkpoint))
    assert data.text.domains == ("a", "b")
    for number, domain in enumerate(([*documents(20)], [*documents(9, start=50)])):
        stream: list[int] = []
        for row in (data.text.domain_N == number).nonzero().flatten().tolist():
            stream += data.text.tokens_NS[row, : int(data.text.lengths_N[row])].tolist()
        assert [document for document in tokenizer.decode(stream).split(tokenizer.eos_token) if document] == domain


def test_two_modules_agree(checkpoint: Path, text: Path) -> None:
    one, other = (TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=9) for _ in range(2))
    assert one.text.fingerprint == other.text.fingerprint
    assert one.content_fingerprint == other.content_fingerprint


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"batch_size": -3}, {"samples": 0}, {"seq_len": 1}, {"seq_len": -2048}]
)
def test_numbers_out_of_range(bad: dict[str, int]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(InputError, match=f"--data.{name} {value}"):
        TextDataModule("text", **bad)


def test_a_training_step_needs_enough_windows(checkpoint: Path, text: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=4, batch_size=5)
    with pytest.raises(InputError, match="4 windows"):
        data.train_dataloader()
    assert len(data.test_dataloader()) == 1  # where nothing is dropped, there is always a batch


class Watcher(LightningModule):
    """Somebody's module: notes which windows it was given in each loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[tuple[int, ...]]] = {"train": [], "val": [], "test": [], "predict": []}

    def note(self, loop: str, batch: dict[str, Tensor]) -> None:
        self.seen[loop] += [tuple(row) for row in batch["input_ids"][batch["attention_mask"].any(-1)].tolist()]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.note("train", batch)
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note("predict", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **kwargs,
    )


def rows(data: TextDataModule, path: Path) -> list[tuple[int, ...]]:
    return [tuple(row) for row in data._windows(str(path), data.samples).tokens_NS.tolist()]


def test_each_loop_sees_its_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = TextDataModule(
        str(text / "a.txt"), str(text / "b.txt"), str(checkpoint), seq_len=16, samples=None, batch_size=3
    )
    watcher = Watcher()
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(watcher, data)
    train = rows(data, text / "a.txt")
    assert set(watcher.seen["train"]) <= set(train)
    assert len(watcher.seen["train"]) == len(train) // 3 * 3
    assert watcher.seen["train"] != train[: len(watcher.seen["train"])]  # shuffled
    assert watcher.seen["val"] == rows(data, text / "b.txt")
    for loop in ("validate", "test", "predict"):
        getattr(trainer(tmp_path), loop)(watcher, datamodule=data)
    assert watcher.seen["val"] == rows(data, text / "b.txt") + train
    assert watcher.seen["test"] == watcher.seen["predict"] == train


def test_fit_without_validation_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, batch_size=2)
    watcher = Watcher()
    trainer(tmp_path, max_steps=2).fit(watcher, data)
    assert watcher.seen["val"] == []


def epochs(seen: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [seen[start : start + size] for start in range(0, len(seen), size)]


def test_epochs_differ_in_order_only(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=12, batch_size=3)
    watcher = Watcher()
    trainer(tmp_path, max_epochs=3).fit(watcher, data)
    parts = epochs(watcher.seen["train"], 12)
    assert len(parts) == 3
    assert sorted(parts[0]) == sorted(parts[1]) == sorted(parts[2])
    assert len({str(part) for part in parts}) == 3


def test_limited_epochs_go_through_other_windows(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=12, batch_size=3)
    watcher = Watcher()
    trainer(tmp_path, max_epochs=2, limit_train_batches=2).fit(watcher, data)
    first, second = epochs(watcher.seen["train"], 6)
    assert first != second


def test_predict_starts_where_it_is_told(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    data = TextDataModule(str(text), tokenizer=str(checkpoint), seq_len=16, samples=12, batch_size=3)
    data.start_batch = 2
    loader = data.predict_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert sum(len(batch["input_ids"]) for batch in loader) == 6


def test_a_bad_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data\.tokenizer"):
        load_tokenizer(None)
    with pytest.raises(InputError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("val_samples", "windows"), [(None, 6), (3, 3), ("all", None)])
def test_validation_text_has_its_own_count(checkpoint: Path, text: Path, val_samples: Any, windows: int | None) -> None:
    a, b = str(text / "a.txt"), str(text / "b.txt")
    settings: dict[str, Any] = {"tokenizer": str(checkpoint), "seq_len": 16}
    data = TextDataModule(a, b, samples=6, val_samples=val_samples, **settings)
    alone = TextDataModule(b, samples="all" if windows is None else windows, **settings)
    assert data.val_text.fingerprint == data.validation().text.fingerprint == alone.text.fingerprint
    assert len(data.text) == 6
    assert TextDataModule(a, samples=6, **settings).validation().text.fingerprint == data.text.fingerprint
