"""The passes that give statistics their gradients, some layers at a time; what is finished survives a kill."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.files import replaced_file
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.modules.gradient_pass import GradientPass
from lightning_moe.moe.ranks import gathered
from lightning_moe.stats.gradients import GradientSums, layer_chunks, sum_bytes, trade, with_gradients
from lightning_moe.stats.store import ModelStats


def add_gradients(
    trainer: Trainer, model: MoECausalLM, data: TextDataModule, stats: ModelStats, folder: Path
) -> ModelStats:
    """The statistics with figures of gradients on the same text; every rank must call it.

    ``folder``, which all ranks see, gets a file for each finished layer; a pass that was killed is made again, those
    before it are not. The caller removes it once the result is safe.
    """
    model.prepare(trainer)
    found = _finished(folder, [layer.name for layer in model.moe_layers])
    chunks = layer_chunks([layer for layer in model.moe_layers if layer.name not in found], model.gradient_memory)
    if chunks:
        told = trade([sum_bytes(chunk) for chunk in chunks], model.gradient_memory)
        if trainer.is_global_zero:
            print(told)
            if found:
                print(f"Going on after {len(found)} layers of an earlier run.")
    for chunk in chunks:
        sums = GradientSums(chunk)
        data.start_batch = 0
        try:
            with _gradients_allowed(trainer):
                trainer.predict(GradientPass(model, sums), datamodule=data, return_predictions=False)
        except (KeyboardInterrupt, SystemExit):
            if found and trainer.is_global_zero:
                print("Stopped; the same command goes on after the last finished layers.", file=sys.stderr)
            raise
        figures = sums.figures()
        found |= figures
        if trainer.is_global_zero:
            for name, tensors in figures.items():
                with replaced_file(_file(folder, name)) as beside:
                    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
    return replace(stats, layers=with_gradients(stats.layers, found))


def forget_gradients(folder: Path) -> None:
    """Remove what ``add_gradients`` left for the case of a kill."""
    for file in folder.glob("gradients-*.safetensors"):
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _file(folder: Path, layer: str) -> Path:
    return folder / f"gradients-{layer}.safetensors"


def _finished(folder: Path, layers: list[str]) -> dict[str, dict[str, Tensor]]:
    """The figures of the layers that every rank finds finished."""
    there = gathered([name for name in layers if _file(folder, name).is_file()])
    return {name: load_file(_file(folder, name)) for name in layers if all(name in names for names in there)}


@contextmanager
def _gradients_allowed(trainer: Trainer) -> Iterator[None]:
    loop = trainer.predict_loop
    before, loop.inference_mode = loop.inference_mode, False
    try:
        yield
    finally:
        loop.inference_mode = before
