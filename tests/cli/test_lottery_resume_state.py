"""What goes on after a kill beside the rounds: the place in an epoch, a search, chance, and gradient checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_moe.modules.causal_lm import MoECausalLM
from tests.cli.killed_rounds import (
    KD_STEP,
    SHORT,
    STEP,
    SURGERY,
    Whole,
    args_of,
    assert_ends_alike,
    die,
    go_on,
    kill,
    often,
    weights,
    whole_runs,
)
from tests.helpers.checkpoint import Commands, edited_copy, write_text
from tests.helpers.thinning import thinned

SEARCH = "lightning_moe.search.diep:DiEPSearch.training_step"


@pytest.fixture(autouse=True)
def _at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves at each step of tuning; short searches; no pictures."""
    often(monkeypatch)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_runs(checkpoint, text, tmp_path_factory)


@pytest.mark.parametrize("call", thinned([2, 3, 4, 5, 6, 9, 11, 18], 3))
def test_killed_amid_epochs(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """A text gone through several times, in steps of two batches; the third batch of an epoch is a step alone."""
    unbroken, work = whole("many epochs")
    assert len(work.tuned) == 18 and len({window for batch in work.tuned for window in batch}) == 7
    args = args_of("many epochs", checkpoint, text, tmp_path)
    die(run, args, STEP, call)
    rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    done = call - 1
    assert rest.tuned == work.tuned[done - (done % 3 == 1) :]


@pytest.mark.parametrize("call", thinned([1, 2, 3, 5, 6], 3))
def test_killed_in_a_search(
    run: Commands, whole: Whole, checkpoint: Path, text: Path, tmp_path: Path, call: int
) -> None:
    """Three updates a round, each saved."""
    unbroken, work = whole("diep")
    args = args_of("diep", checkpoint, text, tmp_path)
    die(run, args, SEARCH, call)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, SEARCH, 6 - call + 2)  # it has no more than what is left to do
        rest = go_on(run, args)
    assert_ends_alike(tmp_path, unbroken)
    assert rest.tuned == (work.tuned if call <= 3 else work.tuned[2:])


@pytest.mark.parametrize(
    ("name", "where", "calls"),
    thinned(
        [
            ("lottery", STEP, (2, 3, 5)),
            ("accumulated", STEP, (4, 8)),
            ("many epochs", STEP, (3, 4, 5, 6, 9)),  # the third batch ends an epoch
            ("router-kd", KD_STEP, (2, 5)),
        ],
        2,
    ),
)
def test_killed_with_dropout(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, name: str, where: str, calls: tuple[int, ...]
) -> None:
    """What chance takes from attention is the same after a kill, which meanwhile has used it otherwise."""
    write_text(text.with_name("short") / "short.txt", [(text / "harbour.txt").read_text()[:SHORT]])
    noisy = edited_copy(checkpoint, tmp_path / "noisy", attention_dropout=0.2)
    run.ok(*args_of(name, noisy, text, tmp_path / "whole"))
    run.ok(*args_of(name, checkpoint, text, tmp_path / "quiet"))
    unbroken, quiet = weights(tmp_path / "whole"), weights(tmp_path / "quiet")
    assert any(not torch.equal(unbroken[weight], quiet[weight]) for weight in unbroken), "else this test says nothing"
    for call in calls:
        args = args_of(name, noisy, text, tmp_path / str(call))
        die(run, args, where, call)
        torch.rand(call)
        go_on(run, args)
        assert_ends_alike(tmp_path / str(call), tmp_path / "whole")


@pytest.mark.parametrize(("where", "call"), [(SURGERY, 1), (STEP, 4)])
def test_gradient_checkpointing_is_on_again(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """What fits into memory in one run does so after a kill."""
    args = [*args_of("lottery", checkpoint, text, tmp_path), "--model.gradient_checkpointing", "true"]
    die(run, args, where, call)
    on, stock = [], MoECausalLM.training_step

    def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        on.append(module.network.is_gradient_checkpointing)
        return stock(module, batch, batch_idx)

    monkeypatch.setattr(MoECausalLM, "training_step", step)
    run.ok(*args)
    assert on and all(on)
