"""The next-token loss and its perplexities: token by token, whatever the batches, loops and ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_moe.cli.main import main
from lightning_moe.modules.causal_lm import MoECausalLM, next_token_loss
from lightning_moe.stats.layer_stats import TENSORS
from lightning_moe.stats.store import load_stats
from tests.helpers.checkpoint import VOCAB, read
from tests.helpers.commands_on_ranks import commands_on_ranks
from tests.helpers.small_fits import batch_of, made, trainer, training_text
from tests.helpers.thinning import thinned


def reference_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[list[float], list[int]]:
    """Row by row and token by token: a token counts when it and the next one are real."""
    losses, counts = [], []
    for row in range(ids.shape[0]):
        loss, count = 0.0, 0
        for place in range(ids.shape[1] - 1):
            if mask[row, place] and mask[row, place + 1]:
                loss -= float(logits[row, place].double().log_softmax(-1)[ids[row, place + 1]])
                count += 1
        losses.append(loss)
        counts.append(count)
    return losses, counts


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_loss_equals_a_slow_reference(lengths: list[int], seed: int, left: bool) -> None:
    """With padding at the right, as ours is, or at the left, as others' may be."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), 7, 11, generator=generator)
    ids = torch.randint(0, 11, (len(lengths), 7), generator=generator)
    mask = torch.stack([(torch.arange(7) < length).long() for length in lengths])
    mask = mask.flip(-1) if left else mask
    loss_B, count_B = next_token_loss(logits, batch_of(ids, mask))
    losses, counts = reference_loss(logits, ids, mask)
    assert count_B.tolist() == counts
    torch.testing.assert_close(loss_B, torch.tensor(losses), rtol=1e-5, atol=1e-5)


def test_padding_changes_no_loss(checkpoint: Path) -> None:
    """A padded window, beside a blank one, has the loss it has alone."""
    module = made(MoECausalLM(str(checkpoint))).eval()
    ids = torch.randint(3, VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    alone, count = next_token_loss(module(batch_of(ids[:, :9])), batch_of(ids[:, :9]))
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[0, :9] = 1
    padded = batch_of(torch.cat([ids, ids]), mask)
    loss_B, count_B = next_token_loss(module(padded), padded)
    torch.testing.assert_close(loss_B[0], alone[0], rtol=1e-5, atol=1e-5)
    assert count_B.tolist() == [int(count[0]), 0]
    assert loss_B[1].item() == 0.0


def test_perplexity_does_not_depend_on_batches(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for batch_size in (1, 4, 100):
        run = trainer(tmp_path)
        data = training_text(checkpoint, text, samples=11, batch_size=batch_size)
        run.validate(MoECausalLM(str(checkpoint)), data, verbose=False)
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert found[0].keys() >= {"validate/perplexity/harbour", "validate/perplexity/island", "validate/tokens"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_figures_of_each_loop(checkpoint: Path, text: Path, tmp_path: Path, loop: str) -> None:
    run = trainer(tmp_path)
    getattr(run, loop)(MoECausalLM(str(checkpoint)), training_text(checkpoint, text), verbose=False)
    names = {"loss", "perplexity", "tokens", "perplexity/harbour", "perplexity/island"}
    assert {f"{loop}/{name}" for name in names} == set(run.callback_metrics)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    assert metrics[f"{loop}/perplexity"] == pytest.approx(math.exp(metrics[f"{loop}/loss"]), rel=1e-5)


def test_validation_during_fit(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Its figures are those of the validation text, under ``val/``."""
    data = training_text(checkpoint, text / "harbour.txt", val_path=str(text / "island.txt"))
    run = trainer(tmp_path, max_epochs=1)
    module = MoECausalLM(str(checkpoint), lr=0.0)
    run.fit(module, data)
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    other = trainer(tmp_path)
    other.validate(MoECausalLM(str(checkpoint)), training_text(checkpoint, text / "island.txt"), verbose=False)
    assert found == pytest.approx(
        {name.replace("validate/", "val/"): float(value) for name, value in other.callback_metrics.items()}, rel=1e-5
    )


def test_predict_runs_the_decoder_alone(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    module = made(MoECausalLM(str(checkpoint)))
    head: list[Any] = []
    module.network.get_output_embeddings().register_forward_hook(lambda *args: head.append(args))
    trainer(tmp_path).predict(module, datamodule=training_text(checkpoint, text), return_predictions=False)
    assert not head


@pytest.mark.slow
@pytest.mark.parametrize("job", thinned(["score", "evaluate"], 2))
def test_two_ranks_equal_one(checkpoint: Path, text: Path, tmp_path: Path, job: str) -> None:
    """11 windows over 2 ranks with 2 each: the last step has blanks, the second rank never sees some domain's end."""
    data = ["--data.path", text, "--data.seq_len", 16, "--data.samples", 11, "--data.batch_size", 2]
    args = [job, "--model.path", checkpoint, *data]
    main([str(arg) for arg in (*args, "--trainer.accelerator", "cpu", "--out", tmp_path / "1")])
    commands_on_ranks(2, [[*args, "--out", tmp_path / "2"]], "ddp")
    one, two = (read(tmp_path / str(ranks) / "summary.json") for ranks in (1, 2))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert one["request"] == two["request"]
    assert not (tmp_path / "2" / ".partial").exists()
    if job == "evaluate":
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
        assert two["domains"] == pytest.approx(one["domains"], rel=1e-6)
        return
    stats = [load_stats(tmp_path / str(ranks) / "stats.safetensors") for ranks in (1, 2)]
    for left, right in zip(stats[0].layers, stats[1].layers, strict=True):
        for name in TENSORS:
            a, b = getattr(left, name).double(), getattr(right, name).double()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    methods = [read(tmp_path / str(ranks) / "scores.json")["methods"] for ranks in (1, 2)]
    assert methods[0].keys() == methods[1].keys()
