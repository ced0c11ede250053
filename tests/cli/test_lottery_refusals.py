"""Rounds that are not carried out: a request that is known already, or another one, or one that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_moe.cli import lottery as command
from tests.cli.lottery_runs import ITERATIVE, ROUTER_KD, SEQ_LEN, TUNED, Trained, model_args, prune_args, records_of
from tests.helpers.checkpoint import Commands, contents, read


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of what rounds write look at pictures."""
    monkeypatch.setattr(command, "_draw", lambda folder, records: None)


def test_asking_again_does_nothing_and_another_request_is_refused(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = prune_args(checkpoint, text, *TUNED, "--out", tmp_path)
    run.ok(*args)
    before = contents(tmp_path)
    trained = Trained(monkeypatch)
    for same in ((), ("--scope", "layer", "--recovery.kind", "finetune", "--trainer.gradient_clip_algorithm", "norm")):
        assert "This very request was carried out here before" in run.ok(*args, *same).out
    for option, value, word in (
        ("--rounds", 1, "rounds"),
        ("--spacing", "cosine", "spacing"),
        ("--finetune_tokens", 128, "finetune_tokens"),
        ("--finetune_growth", 1.0, "finetune.growth"),
        ("--finetune_lr", 0.1, "finetune.lr"),
        ("--finetune_path", text / "island.txt", "finetune.content"),
        ("--recovery.train", "routers", "finetune.train"),
        ("--recovery.batch_tokens", 64, "finetune.batch_tokens"),
        ("--recovery.load_balance", 0, "finetune.load_balance"),
        ("--recovery.entropy", 0.01, "finetune.entropy"),
        ("--seed_everything", 1, "seed"),
        ("--data.batch_size", 4, "data.batch_size"),
        ("--data.val_samples", 2, "data.val_samples"),
        ("--data.val_path", text / "harbour.txt", "data.val_path"),
        ("--trainer.precision", "bf16-mixed", "precision"),
        ("--trainer.gradient_clip_val", 0.5, "gradient_clip_val"),
        ("--trainer.gradient_clip_algorithm", "value", "gradient_clip_algorithm"),
        ("--finetune_tokens", 0, "finetune_tokens"),
    ):
        refused = run(*args, option, value)
        assert refused.code == 2 and len(refused.err.splitlines()) == 1, (option, refused.err)
        assert word in refused.err and "--overwrite" in refused.err, refused.err
    assert contents(tmp_path) == before and not trained.windows
    run.ok(*args, "--ratio", 0.25, "--overwrite", "true")
    assert len(trained.windows) == 6
    assert {len(ids) for ids in read(tmp_path / "plan.json")["keep"].values()} == {6}
    assert [record.ratio for record in records_of(tmp_path)] == [0.125, 0.25]


# ----------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "stats": (("--rounds", 2, "--stats", "s.safetensors"), ["--stats", "rounds"]),
    "scores": (("--rounds", 2, "--scores", "scores.json"), ["--scores", "rounds"]),
    "plan": ((*TUNED, "--plan", "plan.json"), ["--plan", "rounds"]),
    "merge": ((*TUNED, "--merge", "true"), ["--merge", "rounds"]),
    "skipping": (("--rounds", 2, "--skipping", "naee"), ["--skipping", "rounds"]),
    "tokens and stats": (("--finetune_tokens", 64, "--stats", "s.safetensors"), ["--stats"]),
    "no rounds": (("--rounds", 0), ["--rounds 0"]),
    "rounds below 0": (("--rounds", -2), ["--rounds -2"]),
    "more rounds than experts go": (("--rounds", 9), ["round 1 of 9", "drops nothing"]),
    "list out of order": (("--rounds", "[0.5, 0.25]"), ["--rounds", "ascending"]),
    "list with another end": (("--rounds", "[0.125, 0.25]"), ["--rounds", "0.5"]),
    "empty list": (("--rounds", "[]"), ["--rounds []", "0.5"]),
    "too much": (("--rounds", 2, "--ratio", 0.9), ["--ratio 0.9", "possible ratios"]),
    "ratio": (("--rounds", 2, "--ratio", 1.5), ["--ratio", "between 0 and 1"]),
    "floor": (("--rounds", 2, "--scope", "global", "--floor", 9), ["--floor 9"]),
    "method": (("--rounds", 2, "--method", "eann"), ["'eann'", "'ean'"]),
    "direction": (("--rounds", 2, "--method", "diep", "--direction", "min"), ["--direction min", "diep"]),
    "spacing": (("--rounds", 2, "--spacing", "log"), ["--spacing", "cosine"]),
    "rate without tokens": (("--rounds", 2, "--finetune_lr", 1e-4), ["--finetune_tokens"]),
    "rate without anything": (("--finetune_lr", 1e-4), ["--finetune_tokens"]),
    "text without tokens": (("--finetune_path", "text"), ["--finetune_tokens"]),
    "recovery without tokens": (("--recovery.kind", "router-kd"), ["--finetune_tokens"]),
    "recovery, rounds": (("--rounds", 2, "--recovery.z_loss", 0.1), ["--finetune_tokens"]),
    "what router-kd trains": ((*TUNED, "--recovery.kind", "router-kd", "--recovery.train", "routers"), ["router-kd"]),
    "entropy, router-kd": ((*ROUTER_KD, "--recovery.entropy", 0.1), ["--recovery.entropy 0.1", "router-kd"]),
    "kind": ((*TUNED, "--recovery.kind", "distill"), ["--recovery.kind", "router-kd"]),
    "tokens below 0": (("--rounds", 2, "--finetune_tokens", -5), ["--finetune_tokens -5"]),
    "tokens below 0, one round": (("--finetune_tokens", -5), ["--finetune_tokens -5"]),
    "growth": ((*TUNED, "--finetune_growth", 0), ["--finetune_growth 0"]),
    "growth without end": ((*TUNED, "--finetune_growth", 1e308), ["--finetune_growth 1e+308"]),
    "rate 0": ((*TUNED, "--finetune_lr", 0), ["--finetune_lr 0"]),
    "rate below 0": ((*TUNED, "--finetune_lr", -1e-4), ["--finetune_lr -0.0001"]),
    "batch": ((*TUNED, "--recovery.batch_tokens", 0), ["--recovery.batch_tokens 0"]),
    "load balance": ((*TUNED, "--recovery.load_balance", -1), ["--recovery.load_balance -1.0: 0 or more"]),
    "z loss": ((*TUNED, "--recovery.z_loss", -1), ["--recovery.z_loss -1.0: 0 or more"]),
    "bias step": ((*TUNED, "--recovery.bias_step", -0.1), ["--recovery.bias_step -0.1: 0 or more"]),
    "entropy": ((*TUNED, "--recovery.entropy", -1), ["--recovery.entropy -1.0: 0 or more"]),
    "what learns": ((*TUNED, "--recovery.train", "gates"), ["--recovery.train", "gates", "routers+norms"]),
    "less to calibrate": ((*TUNED, "--trainer.limit_predict_batches", 1), ["--trainer.limit_predict_batches"]),
    "less to measure": ((*ITERATIVE, "--trainer.limit_val_batches", 1), ["--trainer.limit_val_batches"]),
    "less to tune": ((*TUNED, "--trainer.limit_train_batches", 0.5), ["--trainer.limit_train_batches"]),
    "less than a batch in a step": ((*TUNED, "--recovery.batch_tokens", SEQ_LEN), ["--recovery.batch_tokens 16", "32"]),
    "tuning in 16 bits": ((*TUNED, "--trainer.precision", "bf16-true"), ["--trainer.precision bf16-true", "16 bits"]),
    "weights in 16 bits": ((*TUNED, "--model.dtype", "bfloat16"), ["--model.dtype bfloat16", "leave it out"]),
    "spaced list": (("--rounds", "[0.25, 0.5]", "--spacing", "cosine"), ["--spacing cosine", "list of --rounds"]),
    "growth without tokens": (
        ("--rounds", 2, "--finetune_growth", 1.5),
        ["--finetune_growth 1.5", "--finetune_tokens"],
    ),
    "growth without anything": (("--finetune_growth", 1.5), ["--finetune_growth 1.5", "--finetune_tokens"]),
    "text to tune on": ((*TUNED, "--finetune_path", "./nowhere.txt"), ["./nowhere.txt"]),
    "less than a batch": ((*TUNED, "--data.batch_size", 5000), ["--data.batch_size"]),
    "validation": ((*TUNED, "--data.val_path", "./nowhere.txt"), ["./nowhere.txt"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_any_work(
    run: Commands, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In one line, before a model is loaded, and no file is left."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("lightning_moe.modules.causal_lm.load_model", load)
    args, words = REFUSED[name]
    said = run(*prune_args(checkpoint, text, "--out", tmp_path / "out", *args))
    assert said.code == 2
    assert len(said.err.splitlines()) == 1, said.err
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()


def test_no_text_is_refused(run: Commands, checkpoint: Path, tmp_path: Path) -> None:
    said = run("prune", *model_args(checkpoint), *TUNED, "--out", tmp_path / "out")
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert "--data.path" in said.err and not (tmp_path / "out").exists()
