"""Somebody's script: a LightningModule, a Trainer and ``moe_fsdp``, on as many processes as it is told.

``on_ranks(JOB, FOLDER, DEVICES)``; rank 0 writes what it found to ``FOLDER/JOB.json``.
``two`` does what ``alone`` does on one process, and what only several ranks can; ``back`` goes on from its checkpoints;
``four`` are replicas.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import model_parallel
from torch.utils.data import DataLoader

from lightning_moe.moe.checkpoints import load_model
from lightning_moe.moe.export import export_model
from lightning_moe.moe.ranks import gathered, num_ranks, rank
from lightning_moe.moe.split_tensors import is_split, whole
from lightning_moe.strategies import MoEFSDPStrategy
from tests.helpers.families import tiny_batch
from tests.helpers.foreign_modules import Foreign, Headed, Parted, Taught, Toggling
from tests.helpers.forked_ranks import start_as_torchrun

BATCH = 4
VALIDATED = 50
"""The seed of the text it validates on."""


class Stop(Callback):
    """Ends the fit with its first epoch, as a time limit does; a checkpoint is written before."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.save_checkpoint(self.file)
        trainer.should_stop = True


def batches(count: int, seed: int = 0) -> DataLoader[Any]:
    """This rank's part of batches that are the same on any number of ranks."""
    mine = [tiny_batch(BATCH, seed=seed + turn)[rank() :: num_ranks()] for turn in range(count)]
    return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]


class Loaders(LightningDataModule):
    """Loaders that are made once the ranks know each other."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> Any:
        return batches(self.steps)

    def val_dataloader(self) -> Any:
        return batches(1, seed=VALIDATED)

    test_dataloader = val_dataloader


class Run:
    def __init__(self, devices: int, strategy: Any, **trainer: Any) -> None:
        settings: dict[str, Any] = {"max_steps": 4, "num_sanity_val_steps": 0, "enable_checkpointing": False}
        self.trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings | trainer,
        )

    def fit(self, module: Foreign, ckpt: Path | None = None, steps: int = 4) -> Foreign:
        self.trainer.fit(module, datamodule=Loaders(steps), ckpt_path=ckpt, weights_only=False)
        return module

    def validate(self, module: Foreign) -> float:
        return float(self.trainer.validate(module, datamodule=Loaders(4), verbose=False)[0]["val"])


def figures(module: Foreign) -> dict[str, Any]:
    """Losses, sums of all weights as a whole, and whether what is not split is the same everywhere."""
    state = {name: whole(p.detach()).double() for name, p in module.named_parameters()}
    plain = [float(p.detach().double().sum()) for p in module.parameters() if not is_split(p)]
    return {
        "losses": module.losses,
        "weights": {name: [float(p.sum()), float(p.square().sum())] for name, p in state.items()},
        "alike": all(one == plain for one in gathered(plain)),
        "split": sum(is_split(p) for p in module.parameters()),
        "seen": getattr(module, "seen", []),
        "validated": float(module.trainer.callback_metrics.get("val", torch.nan)),
    }


def looked_at(run: Run, folder: Path) -> dict[str, Any]:
    """Losses on the same text: before, within, between and after two fits, each beside that of the exported model."""
    ids = tiny_batch(BATCH, seed=VALIDATED)

    def exported() -> float:
        export_model(module.inner, folder)
        with torch.no_grad():
            return float(load_model(str(folder))(input_ids=ids, labels=ids).loss)

    module = Foreign()
    found: dict[str, list[float]] = {"before": [run.validate(module), exported()]}
    for name in ("first", "second"):
        run.fit(module, steps=2)
        within = float(run.trainer.callback_metrics["val"])
        tested = float(run.trainer.test(module, datamodule=Loaders(2), verbose=False)[0]["val"])
        found[name] = [within, tested, run.validate(module), exported()]
        run.trainer.fit_loop.max_epochs = 2
    return {**found, "losses": module.losses}


def refused(work: Callable[[], Any]) -> list[list[str]]:
    """The type of the error and its message, of each rank."""
    try:
        work()
    except BaseException as error:  # torch has errors that are no Exception
        return gathered([type(error).__name__, str(error)])
    return gathered(["nothing", ""])


def refusals(run: Callable[..., Run], parts: Path, file: Path) -> dict[str, list[list[str]]]:
    """What it says of checkpoints that are damaged, or another model's."""
    folder = parts.parent / "damaged"

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    damage: dict[str, Callable[[Path], None]] = {
        "no part": lambda copy: (copy / "__1_0.distcp").unlink(),
        "cut part": lambda copy: cut(copy / "__1_0.distcp"),
        "no list": lambda copy: (copy / ".metadata").unlink(),
        "cut list": lambda copy: cut(copy / ".metadata"),
        "cut record": lambda copy: cut(copy / "meta.pt"),
        "empty record": lambda copy: (copy / "meta.pt").write_bytes(b""),
        "no record": lambda copy: (copy / "meta.pt").unlink(),
        "nothing in it": lambda copy: [shutil.rmtree(copy), copy.mkdir()],  # type: ignore[func-returns-value]
    }
    if rank() == 0:
        for name, spoil in damage.items():
            shutil.copytree(parts, folder / name)
            spoil(folder / name)
        shutil.copyfile(file, folder / "cut file")
        cut(folder / "cut file")
    torch.distributed.barrier()
    found = {name: refused(lambda name=name: run().fit(Foreign(), folder / name)) for name in [*damage, "cut file"]}  # type: ignore[misc]
    found["absent"] = refused(lambda: run().fit(Foreign(), folder / "absent"))
    others = {"experts": {"num_experts": 6}, "more": {"num_hidden_layers": 3}, "fewer": {"num_hidden_layers": 1}}
    for kind, path in {"parts": parts, "file": file}.items():
        for name, settings in others.items():
            found[f"{name}, {kind}"] = refused(partial(run().fit, Foreign(**settings), path))
        found[f"optimisers, {kind}"] = refused(partial(run().fit, Foreign(by_hand=True), path))
    return found


def interrupted(run: Callable[[], Run], file: Path) -> dict[str, Any]:
    """A save that fails half-way, in the place of an older one: that one is still whole."""
    copy, stock = file.with_name("again.ckpt"), model_parallel._distributed_checkpoint_save

    def half(state: Any, path: Path) -> None:
        stock(state, path)
        raise OSError("no room")

    if rank() == 0:
        shutil.copytree(file, copy)
    model_parallel._distributed_checkpoint_save = half
    try:
        one = run()
        one.trainer.callbacks.append(Stop(copy))  # type: ignore[attr-defined]
        assert refused(lambda: one.fit(Foreign(), steps=1))[0] == ["OSError", "no room"]
    finally:
        model_parallel._distributed_checkpoint_save = stock
    return figures(run().fit(Foreign(), copy, steps=2))


def fits(run: Callable[..., Run], folder: Path) -> dict[str, Any]:
    """What any number of processes does alike."""
    return {
        "automatic": figures(run().fit(Foreign())),
        "clipped": figures(run(gradient_clip_val=0.05).fit(Foreign())),
        "clipped by value": figures(run(gradient_clip_val=1e-3, gradient_clip_algorithm="value").fit(Foreign())),
        "accumulated": figures(run(accumulate_grad_batches=2, max_steps=2).fit(Foreign())),
        "by hand": figures(run().fit(Foreign(by_hand=True))),
        "toggled": figures(run().fit(Toggling())),
        "headed": figures(run().fit(Headed())),
        "parted": figures(run().fit(Parted())),
        "taught": figures(run().fit(Taught())),
        "two epochs": figures(run().fit(Foreign(), steps=2)),
        "mixed": figures(run(precision="bf16-mixed").fit(Foreign())),
        "looked at": looked_at(run(max_steps=-1, max_epochs=1, num_sanity_val_steps=1), folder),
        "tied": figures(run().fit(Foreign(tie_word_embeddings=True), steps=2)),
    }


def checkpoints(run: Callable[..., Run], split: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """Fits that stop and go on, from a folder of parts or from one file, and what they refuse."""
    found: dict[str, Any] = {}
    for full in (False, True):
        settings = {"save_distributed_checkpoint": not full}
        file = folder / f"full-{full}.ckpt"
        run(split(**settings), callbacks=[Stop(file)]).fit(Foreign(), steps=2)
        assert file.is_file() == full
        found[f"resumed, {full}"] = figures(run(split(**settings)).fit(Foreign(), file, steps=2))
    keeper = ModelCheckpoint(folder / "kept", save_last=True)
    run(split(), callbacks=[keeper], enable_checkpointing=True, max_epochs=1).fit(Foreign(), steps=2)
    found["resumed, kept"] = figures(run(split()).fit(Foreign(), folder / "kept" / "last.ckpt", steps=2))
    found["resumed, one"] = figures(run(split()).fit(Foreign(tie_word_embeddings=True), folder / "one.ckpt", steps=2))
    found["interrupted"] = interrupted(lambda: run(split()), folder / "full-False.ckpt")
    found["refused"] = refusals(lambda: run(split()), folder / "full-False.ckpt", folder / "full-True.ckpt")
    found["refused"]["precision"] = refused(lambda: run(split(), precision="16-true").fit(Foreign()))
    found["refused"]["replicas"] = refused(lambda: run(split(replicas=3)).fit(Foreign()))
    return found


def alone(folder: Path) -> dict[str, Any]:
    """The fits of one process, and its checkpoint, in ``FOLDER/one.ckpt``."""
    run = partial(Run, 1, "auto")
    run(callbacks=[Stop(folder / "one.ckpt")]).fit(Foreign(tie_word_embeddings=True), steps=2)
    return fits(run, folder / "one-exported")


def two(run: Callable[..., Run], folder: Path) -> dict[str, Any]:
    return {
        **fits(partial(run, "moe_fsdp"), folder / "two-exported"),
        "recomputed": figures(run(MoEFSDPStrategy(activation_checkpointing=True)).fit(Foreign())),
        "offloaded": figures(run(MoEFSDPStrategy(cpu_offload=True)).fit(Foreign())),
        **checkpoints(run, MoEFSDPStrategy, folder),
    }


def back(run: Callable[..., Run], folder: Path) -> dict[str, Any]:
    files = {str(full): folder / f"full-{full}.ckpt" for full in (False, True)}
    return {name: figures(run("moe_fsdp").fit(Foreign(), file, steps=2)) for name, file in files.items()}


def four(run: Callable[..., Run], folder: Path) -> dict[str, Any]:
    file = folder / "four.ckpt"
    run(MoEFSDPStrategy(2), callbacks=[Stop(file)]).fit(Foreign(), steps=2)
    return {
        "automatic": figures(run(MoEFSDPStrategy(2)).fit(Foreign())),
        "clipped": figures(run(MoEFSDPStrategy(2), gradient_clip_val=0.05).fit(Foreign())),
        "headed": figures(run(MoEFSDPStrategy(2)).fit(Headed())),
        "resumed": figures(run(MoEFSDPStrategy(2)).fit(Foreign(), file, steps=2)),
    }


def on_ranks(job: str, folder: Path, devices: int) -> dict[str, Any]:
    """What rank 0 found, of a job on so many processes."""
    start_as_torchrun(_work, devices, job, folder, devices)
    found: dict[str, Any] = json.loads((folder / f"{job}.json").read_text())
    return found


def _work(job: str, folder: Path, devices: int) -> None:
    found = {"two": two, "back": back, "four": four}[job](partial(Run, devices), folder)
    if rank() == 0:
        (folder / f"{job}.json").write_text(json.dumps(found))
