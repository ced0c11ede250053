"""Settings of Trainer, model and text that tuning and searches have options of their own for: none is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_moe.cli import lottery as command
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.search.presets import PRESETS
from tests.cli.lottery_runs import ITERATIVE, SEQ_LEN, TUNED, model_args, prune_args, records_of, text_args
from tests.helpers.checkpoint import Commands, Result, read

LENGTHS: dict[str, tuple[object, ...]] = {
    "--trainer.max_steps 1": (),
    "--trainer.max_epochs 1": (),
    "--trainer.min_steps 50": (),
    "--trainer.min_epochs 2": (),
    "--trainer.max_time 1 s": ("--trainer.max_time", "00:00:00:01"),
    "--data.shuffle_seed 9": (),
}
"""As the refusal says them, and as they are given where that is not the same."""

TUNING: dict[str, tuple[object, ...]] = {
    "--trainer.accumulate_grad_batches 5": (),
    "--model.lr 0.5": (),
    "--model.min_lr_ratio 0.5": (),
    "--model.warmup_steps 7": (),
    "--model.weight_decay 0.3": (),
    "--model.betas (0.5, 0.6)": ("--model.betas", "[0.5,0.6]"),
}

REMEDIES = {
    "--model.lr": "--finetune_lr",
    "--trainer.accumulate_grad_batches": "--recovery.batch_tokens",
    "--data.shuffle_seed": "--seed_everything",
} | {setting.split()[0]: "--finetune_tokens" for setting in LENGTHS if setting.startswith("--trainer")}

STEPS, TOKENS = 40, 40 * 2 * SEQ_LEN


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


def given(said: str, args: tuple[object, ...]) -> tuple[object, ...]:
    return args or tuple(said.split())


def compare_args(checkpoint: Path, text: Path, out: Path, *more: object) -> list[object]:
    grid = ("--methods", "[ean]", "--ratios", "[0.5]", "--scopes", "[layer]", "--seeds", 1)
    return ["compare", *model_args(checkpoint), *text_args(text), *grid, "--out", out, *more]


def assert_refused(said: Result, words: str, out: Path) -> None:
    assert said.code == 2 and len(said.err.splitlines()) == 1, said.err
    assert f"{words}: " in said.err, said.err
    assert not out.exists()


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("lightning_moe.modules.causal_lm.load_model", load)


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("setting", [*LENGTHS, *TUNING])
def test_tuning_refuses_what_it_would_pass_over(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, setting: str
) -> None:
    """`prune` and `compare` alike, in one line with the remedy, before any work."""
    args, out = given(setting, (LENGTHS | TUNING)[setting]), tmp_path / "out"
    tuned = compare_args(checkpoint, text, out, "--strategies", "[lottery]", *TUNED, *args)
    for said in (run(*prune_args(checkpoint, text, *TUNED, *args, "--out", out)), run(*tuned)):
        assert_refused(said, setting, out)
        assert REMEDIES.get(setting.split()[0], "leave it out") in said.err, said.err


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("setting", LENGTHS)
def test_searches_refuse_another_length(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, setting: str
) -> None:
    args, out = given(setting, LENGTHS[setting]), tmp_path / "out"
    on = [*model_args(checkpoint), *text_args(text), "--out", out, *args]
    for said in (
        run("search", *on),
        run("prune", *on, "--method", "diep"),
        run("prune", *on, "--method", "diep", *ITERATIVE),
        run(*compare_args(checkpoint, text, out, "--methods", "[ean,diep]", *args)),
    ):
        assert_refused(said, setting, out)


def test_without_learning_they_change_nothing_and_are_no_matter(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    settings = [arg for setting, args in (LENGTHS | TUNING).items() for arg in given(setting, args)]
    for name, args in (("plain", []), ("with", settings)):
        run.ok(*prune_args(checkpoint, text, *ITERATIVE, *args, "--out", tmp_path / name))
    assert (tmp_path / "plain" / "plan.json").read_bytes() == (tmp_path / "with" / "plan.json").read_bytes()
    run.ok(*compare_args(checkpoint, text, tmp_path / "compared", *settings))


def test_what_the_tuning_has_anyway_may_be_said(run: Commands, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """And a learning rate of ``fit``, in a config that both share, beside one of the tuning."""
    run.ok(*prune_args(checkpoint, text, *TUNED, "--finetune_lr", 1e-3, "--out", tmp_path / "plain"))
    same = ("--model.weight_decay", 0.0, "--model.min_lr_ratio", 0.0, "--model.betas", "[0.9,0.95]", "--model.lr", 0.5)
    args = prune_args(checkpoint, text, *TUNED, "--finetune_lr", 1e-3, *same, "--out", tmp_path / "with")
    run.ok(*args)
    one, other = (read(tmp_path / name / "prune.json") for name in ("plain", "with"))
    assert (one["perplexity_after"], one["request"]) == (other["perplexity_after"], other["request"])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_record_says_the_steps_that_were_made(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Somebody's callback, early stopping say, ends the tuning before its time."""
    stock, real = MoECausalLM.training_step, []

    def step(module: MoECausalLM, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        real.append(int(batch["attention_mask"].sum()))
        module.trainer.should_stop = len(real) == 3 * batches
        return stock(module, batch, batch_idx)

    monkeypatch.setattr(MoECausalLM, "training_step", step)
    tuned = ("--rounds", 1, "--finetune_tokens", TOKENS, "--recovery.batch_tokens", batches * 2 * SEQ_LEN)
    run.ok(*prune_args(checkpoint, text, *tuned, "--out", tmp_path))
    (record,) = records_of(tmp_path)
    assert len(real) == 3 * batches < STEPS
    assert (record.steps, record.tokens) == (3, sum(real))
    assert read(tmp_path / "prune.json")["finetune_tokens"] == sum(real)


def test_searches_still_run(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two fits of its own the Trainer's loop is as it was, so that the next is not refused."""
    monkeypatch.setitem(PRESETS, "default", {"updates": 2})
    run.ok(*prune_args(checkpoint, text, *TUNED, "--method", "diep", "--out", tmp_path))
    assert [record.steps for record in records_of(tmp_path)] == [2, 4]
