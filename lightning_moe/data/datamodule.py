"""Text as a LightningDataModule: any folder, file or dataset, tokenized, packed, split over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning.pytorch import LightningDataModule

from lightning_moe.data.loading import RankBatches, ResumableLoader
from lightning_moe.data.packing import PackedText, pack
from lightning_moe.data.text import content_fingerprint, count_domains, read_domains
from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_tokenizer, read_config
from lightning_moe.moe.ranks import check_same

DEFAULT_SEQ_LEN = 2048
DEFAULT_SAMPLES = 256
SHORTEST_SEQ_LEN = 2


class TextDataModule(LightningDataModule):
    """Packed windows of text for training, calibration and evaluation.

    Args:
        path: A ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them, or the name of a dataset.
        val_path: Text for validation during ``fit`` and in ``compare``; the same kinds as ``path``.
        tokenizer: Folder or hub id of the tokenizer. Default: the model's own.
        seq_len: Tokens per window. Default: 2048, or the model's maximum if that is less.
        samples: Windows to take, spread evenly over all files and their whole length, or ``all``. Default: 256, but
            everything for ``fit``.
        val_samples: The same for ``val_path``. Default: as ``samples``.
        batch_size: Windows per batch and rank.
        subset: Configuration name, when ``path`` is a dataset (C4: ``en``).
        split: Split, when ``path`` is a dataset.
        shuffle_seed: Seed of the order of training windows.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        tokenizer: str | None = None,
        seq_len: int | None = None,
        samples: int | Literal["all"] | None = None,
        val_samples: int | Literal["all"] | None = None,
        batch_size: int = 8,
        subset: str | None = None,
        split: str = "validation",
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, SHORTEST_SEQ_LEN),
            ("samples", samples, 1),
            ("val_samples", val_samples, 1),
            ("batch_size", batch_size, 1),
        ):
            if isinstance(value, int) and value < least:
                raise InputError(f"--data.{name} {value}: at least {least} is needed.")
        self.path, self.val_path, self.tokenizer = path, val_path, tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.samples, self.val_samples = samples, val_samples
        self.subset, self.split, self.shuffle_seed = subset, split, shuffle_seed
        self._fitting = False
        self.model_path: str | None = None
        """Folder of the model whose maximum limits the default ``seq_len``; default is the tokenizer's."""
        self.start_batch = 0
        """Batches to leave out of the next predict loop: an earlier, killed one has done them."""
        self._packed: dict[tuple[str, int | None], PackedText] = {}

    @property
    def text(self) -> PackedText:
        """The windows of ``path``."""
        return self._windows(self.path, self.samples)

    @property
    def val_text(self) -> PackedText:
        """The windows of ``val_path``."""
        return self._windows(self.val_path, self.samples if self.val_samples is None else self.val_samples)

    def validation(self) -> TextDataModule:
        """A module of its own whose text is that of ``val_path``, or of ``path`` where there is none."""
        return self._alone(
            self.path if self.val_path is None else self.val_path,
            self.samples if self.val_samples is None else self.val_samples,
        )

    def fewer(self, windows: int) -> TextDataModule:
        """A module of its own with at most so many windows, spread over the same text."""
        return self._alone(self.path, min(windows, len(self.text)))

    def calibration(self, shuffle_seed: int) -> TextDataModule:
        """A module of its own to train on the calibration windows: those that ``predict`` reads, not everything."""
        return self._alone(self.path, self.samples or DEFAULT_SAMPLES, shuffle_seed)

    def training(self, path: str | None, tokens: int, shuffle_seed: int, world_size: int = 1) -> TextDataModule:
        """A module of its own to train on ``path``, or the text itself: windows for so many tokens, or all there are.

        They are spread evenly over the text, and are enough for one step at least; a shorter text is gone through
        again and again.
        """
        windows = max(self.batch_size * world_size, -(-tokens // self.text.tokens_NS.shape[1]))
        return self._alone(self.path if path is None else path, windows, shuffle_seed)

    def check_training(self, world_size: int) -> None:
        """Raise ``InputError`` when there is no text, or too little for one step of training."""
        self.setup("fit")
        if len(self.text) < self.batch_size * world_size:
            self._refuse_too_little(world_size)

    def _refuse_too_little(self, world_size: int) -> NoReturn:
        raise InputError(
            f"{self.path}: {len(self.text)} windows of text, but one training step takes {self.batch_size} on "
            f"each of {world_size} ranks. Lower --data.batch_size or give more text."
        )

    def _alone(
        self, path: str | None, samples: int | Literal["all"] | None, shuffle_seed: int | None = None
    ) -> TextDataModule:
        module = TextDataModule(
            path,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            samples=samples,
            batch_size=self.batch_size,
            subset=self.subset,
            split=self.split,
            shuffle_seed=self.shuffle_seed if shuffle_seed is None else shuffle_seed,
        )
        module.model_path = self.model_path
        module._packed = self._packed  # text that both read is packed once
        return module

    def _windows(self, path: str | None, samples: int | Literal["all"] | None) -> PackedText:
        if path is None:
            raise InputError("no text: give --data.path a file, a folder or the name of a dataset.")
        count = self._num_windows(samples)
        if (path, count) not in self._packed:
            tokenizer = load_tokenizer(self.tokenizer)
            model = str(self.model_path or self.tokenizer)
            limit = longest_seq_len(model)
            if self.seq_len is not None and limit is not None and self.seq_len > limit:
                raise InputError(f"--data.seq_len {self.seq_len}: the model {model} takes at most {limit} tokens.")
            seq_len = self.seq_len or default_seq_len(limit, tokenizer)
            domains = read_domains(path, subset=self.subset, split=self.split)
            self._packed[path, count] = pack(domains, tokenizer, seq_len, count, count_domains(path), source=path)
        return self._packed[path, count]

    def _num_windows(self, samples: int | Literal["all"] | None) -> int | None:
        if samples == "all" or (samples is None and self._fitting):
            return None
        return samples or DEFAULT_SAMPLES

    def _loader(self, text: PackedText, *, train: bool) -> ResumableLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer:
            check_same("the text's fingerprint", text.fingerprint)
        batches = RankBatches(
            len(text),
            self.batch_size,
            rank,
            world_size,
            shuffle=train,
            seed=self.shuffle_seed,
            drop_last=train,
        )
        if len(batches) == 0:
            self._refuse_too_little(world_size)
        return ResumableLoader(text, batches)

    def setup(self, stage: str) -> None:
        """Read and pack, so that bad text is refused before anything else starts."""
        self._fitting = stage == "fit"
        _ = self.text
        if stage == "fit" and self.val_path is not None:
            _ = self.val_text

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.text, train=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and self.val_path is None:
            return []
        return self._loader(self.val_text if fitting else self.text, train=False)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader(self.text, train=False)

    def predict_dataloader(self) -> ResumableLoader:
        loader = self._loader(self.text, train=False)
        loader.batches.start = self.start_batch
        return loader

    @property
    def content_fingerprint(self) -> str | None:
        """Of the files' names and content: has the text changed? None for the name of a dataset."""
        return None if self.path is None else content_fingerprint(self.path)


def default_seq_len(limit: int | None, tokenizer: Any) -> int:
    """min(2048, the model's maximum, or else the tokenizer's)."""
    return min(DEFAULT_SEQ_LEN, limit or tokenizer.model_max_length)


def longest_seq_len(path: str) -> int | None:
    """The maximum that the config of a model names; None where there is no config, as beside a lone tokenizer."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        return None
    limit: int | None = getattr(read_config(path).get_text_config(), "max_position_embeddings", None)
    return limit
