"""NAEE by a Trainer: passes over the calibration text, and a set of experts for each layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.cli.request import refuse_less_text
from lightning_moe.cli.text_pass import watch_text
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.files import write_json
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.layers import LayerShape, find_moe_layers, hugging_face_model
from lightning_moe.moe.ranks import check_same
from lightning_moe.moe.routing import mask_plan
from lightning_moe.pruning.budget import blank_scores, make_plan
from lightning_moe.search.cached_outputs import CachedOutputs, bytes_per_token
from lightning_moe.search.naee import BEAM, ChosenSet, choose_experts, count_sets, is_exact

CACHE_BYTES = 16 << 30
"""Most memory of a process for cached outputs; layers share a pass over the text as far as it goes."""


def naee_sets(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    drops: Mapping[str, int],
    folder: Path,
    progressive: bool = False,
) -> dict[str, ChosenSet]:
    """The experts of each layer whose absence changes its output least, when as many go as ``drops`` says.

    ``progressive`` looks at each layer's inputs with the layers before it cut already, in a pass for each layer;
    otherwise all inputs are the full model's. What is chosen for a layer is kept in ``folder`` at once, and not
    searched again after a kill. Every rank must call it.

    Raises ``InputError`` when the outputs of one layer are too many to be cached.
    """
    refuse_less_text(trainer, "limit_predict_batches")
    data.setup("predict")
    data.start_batch = 0  # an observation that went on after a kill leaves another
    model.prepare(trainer)
    check_vocabulary(model, data)
    shapes = [layer.shape for layer in model.moe_layers]
    num_windows, seq_len = data.text.tokens_NS.shape
    windows = -(-num_windows // trainer.world_size)
    check_cache(shapes, windows, seq_len)
    search = _Search(folder / "layers.json", drops, progressive)
    left = [shape for shape in shapes if drops[shape.name] and shape.name not in search.chosen]
    for names in _passes(left, windows * seq_len, progressive):
        search.names = names
        watch_text(trainer, model, data, search)
    return search.chosen


def drops_of(shapes: Sequence[LayerShape], ratio: float, whole: Sequence[LayerShape] | None = None) -> dict[str, int]:
    """How many experts each layer loses at ``ratio`` under scope layer; ``whole``: see ``make_plan``."""
    plan = make_plan(blank_scores(shapes), ratio, "layer", whole=whole)
    return {shape.name: shape.num_experts - len(plan.keep[shape.name]) for shape in shapes}


def describe_search(shapes: Iterable[LayerShape], drops: Mapping[str, int]) -> str:
    """In words, for people and plans: how the sets of these layers are found."""
    kinds: dict[str, int] = {}
    for shape in shapes:
        count = count_sets(shape, drops[shape.name])
        exact = is_exact(shape, drops[shape.name])
        kind = f"exact, all {count:,} sets" if exact else f"beam of {BEAM}, one by one, of {count:.3g} sets"
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{kind} in {number} layer{'s' * (number > 1)}" for kind, number in kinds.items())


def check_cache(shapes: Sequence[LayerShape], windows: int, seq_len: int) -> None:
    """Raise ``InputError`` when so many windows on each rank are too many for one of the layers."""
    widest = max(shapes, key=bytes_per_token)
    for_window = bytes_per_token(widest) * seq_len
    if for_window * windows > CACHE_BYTES:
        raise InputError(
            f"{widest.name}: what naee keeps of {widest.num_experts} experts on {windows} windows of {seq_len} takes "
            f"{for_window * windows / 2**30:.1f} GiB on each rank, of {CACHE_BYTES / 2**30:g} at most; give more ranks "
            f"or, by --data.samples, at most {CACHE_BYTES // for_window} windows for each."
        )


def _passes(shapes: Sequence[LayerShape], tokens: int, progressive: bool) -> list[list[str]]:
    """The layers of each pass over the text, in the order of depth."""
    passes: list[list[str]] = []
    room = 0
    for shape in shapes:
        needed = bytes_per_token(shape) * tokens
        if not passes or progressive or needed > room:
            passes.append([])
            room = CACHE_BYTES
        passes[-1].append(shape.name)
        room -= needed
    return passes


class _Search(Callback):
    """Caches the outputs of some layers in a predict loop, and chooses their experts at its end."""

    def __init__(self, file: Path, drops: Mapping[str, int], progressive: bool) -> None:
        self.file, self.drops, self.progressive = file, drops, progressive
        stored = json.loads(file.read_text()) if file.is_file() else {}
        self.chosen = {name: ChosenSet(**found) for name, found in stored.items()}
        self.names: list[str] = []
        """The layers of the coming loop."""
        self._caches: list[CachedOutputs] = []
        self._attached = ExitStack()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_same(f"{self.file}: layers chosen so far", sorted(self.chosen))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: masks hold for the tensors that are there, and the loop has moved them to the device by now.
        layers = find_moe_layers(hugging_face_model(pl_module, "naee"))
        if self.progressive:
            self._attached.enter_context(mask_plan(layers, {name: found.keep for name, found in self.chosen.items()}))
        self._caches = [CachedOutputs(layer) for layer in layers if layer.name in self.names]
        for cache in self._caches:
            self._attached.enter_context(cache.attached())

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for cache in self._caches:
            cache.next_batch(batch["attention_mask"])

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached.close()
        while self._caches:
            cache = self._caches.pop(0)  # and its memory
            shape = cache.layer.shape
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.chosen[shape.name] = choose_experts(shape, self.drops[shape.name], cache.errors)
            if trainer.is_global_zero:
                write_json(self.file, {name: asdict(found) for name, found in self.chosen.items()})

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._attached.close()
        self._caches = []
