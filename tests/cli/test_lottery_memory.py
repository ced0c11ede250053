"""Rounds keep one network in memory and no optimiser between two fits; ``compare`` loads none beside another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe.cli import cells, lottery, rounds
from lightning_moe.modules import causal_lm
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.search.presets import PRESETS
from tests.helpers.checkpoint import Commands, read

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
SEQ_LEN = 16
TUNED = ("--finetune_tokens", 4 * SEQ_LEN)


def on(checkpoint: Path, text: Path) -> list[object]:
    data = ["--data.path", text / "harbour.txt", "--data.seq_len", SEQ_LEN, "--data.samples", 8, "--data.batch_size", 2]
    measured = ["--data.val_path", text / "island.txt", "--data.val_samples", 3]
    return [*QUIET, "--model.path", checkpoint, *data, *measured]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "default", {"updates": 2})
    monkeypatch.setattr(lottery, "_draw", lambda folder, records: None)


class Made:
    """Weak references to every optimiser, and to every stack of experts that was there when somebody looked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.optimizers: list[weakref.ref[Any]] = []
        self.stacks: list[weakref.ref[Any]] = []
        init = torch.optim.Optimizer.__init__

        def made(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.optimizers.append(weakref.ref(optimizer))
            init(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.Optimizer, "__init__", made)

    def alive(self, network: torch.nn.Module) -> tuple[int, set[int]]:
        """Optimisers, and the numbers of experts of all stacks, those of ``network`` among them."""
        self.stacks += [weakref.ref(parameter) for parameter in network.parameters() if parameter.dim() == 3]
        gc.collect()
        stacks = [stack for stack in (one() for one in self.stacks) if stack is not None]
        return _count(self.optimizers), {stack.shape[0] for stack in stacks}


def _count(references: list[weakref.ref[Any]]) -> int:
    return sum(one() is not None for one in references)


@pytest.mark.parametrize("more", [(), ("--recovery.kind", "router-kd"), ("--method", "diep")], ids=str)
def test_nothing_of_a_fit_outlives_it(
    run: Commands,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[object, ...],
) -> None:
    """Neither its optimisers nor experts of an earlier size: what is measured or saved next finds the room."""
    made, seen = Made(monkeypatch), list[tuple[int, set[int]]]()
    for moment, function in (("measure", rounds.measure), ("export_model", rounds.export_model)):

        def watched(*args: Any, stock: Any = function, **kwargs: Any) -> Any:
            seen.append(made.alive(next(one for one in args if isinstance(one, torch.nn.Module))))
            return stock(*args, **kwargs)

        monkeypatch.setattr(rounds, moment, watched)
    cut = ("--method", "ean", "--rounds", 2, *TUNED, *more)
    run.ok("prune", *on(checkpoint, text), *cut, "--out", tmp_path)
    assert len(made.optimizers) >= 2
    # Measured whole; then of each round measured once cut, saved and measured once tuned.
    assert seen == [(0, {size}) for size in (8, 6, 6, 6, 4, 4, 4)]


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What goes by chance, because the collector came by, is not let go."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Loaded(list["weakref.ref[Any]"]):
    """Every network that is loaded; never one while another is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (causal_lm,):

            def watched(*args: Any, stock: Any = module.load_model, **kwargs: Any) -> Any:
                assert _count(self) == 0, "an earlier network is still held"
                self.append(weakref.ref(network := stock(*args, **kwargs)))
                return network

            monkeypatch.setattr(module, "load_model", watched)


GRID = ("--methods", "[reap,random]", "--ratios", "[0.25,0.5]", "--scopes", "[layer]", "--seeds", 1)


@pytest.mark.usefixtures("_no_collector")
def test_compare_never_holds_two_networks(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run of rounds and each cut begins with a whole model."""
    loaded, measured = Loaded(monkeypatch), list[int]()
    for module in (cells, rounds):

        def counted(*args: Any, stock: Any = module.measure) -> Any:
            measured.append(_count(loaded))
            return stock(*args)

        monkeypatch.setattr(module, "measure", counted)
    strategies = ("--strategies", "[one-shot,iterative,lottery,one-shot-tuned]")
    run.ok("compare", *on(checkpoint, text), *GRID, *strategies, *TUNED, "--out", tmp_path)
    assert len(loaded) > 8 and len(measured) > 20 and set(measured) == {1}


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("fails", ["at once", "amid a round"])
def test_compare_never_holds_a_network_whose_tuning_failed(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Nothing is measured after such a fit, and the next cell loads another."""
    loaded, steps, stock = Loaded(monkeypatch), 0, MoECausalLM.training_step

    def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == (1 if fails == "at once" else 4):
            raise RuntimeError("out of memory")
        return stock(module, batch, batch_idx)

    monkeypatch.setattr(MoECausalLM, "training_step", step)
    said = run("compare", *on(checkpoint, text), *GRID, "--strategies", "[lottery]", *TUNED, "--out", tmp_path)
    reasons = [row["reason"] for row in read(tmp_path / "compare.json")["cells"] if row["status"] == "failed"]
    assert reasons == ["RuntimeError: out of memory"] * 2 and said.code == 1
    assert len(loaded) > 2
