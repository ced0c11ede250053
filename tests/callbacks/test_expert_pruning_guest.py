"""ExpertPruning as a guest: it leaves no trace, refuses early, takes anybody's text and suffers other guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_moe.callbacks import ExpertPruning, ExpertUsageMonitor, RouterRebalance
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.search.presets import PRESETS
from tests.callbacks.foreign_fit import (
    TOKENS,
    Batches,
    Foreign,
    Killed,
    calibration,
    counts,
    fit,
    loader,
    small_model,
    state_of,
    steps_of,
)
from tests.helpers.checkpoint import VOCAB, documents, save_tokenizer, write_text
from tests.helpers.families import TOP_K, tiny_model


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "default", {"updates": 4})


# --------------------------------------------------------------------------------------------------- traces


def settings_of(module: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which parts are in training mode, which weights learn."""
    return (
        {name: part.training for name, part in module.named_modules()},
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
    )


@pytest.mark.parametrize("method", ["reap", "rwn", "diep"])
def test_modes_and_frozen_weights_are_as_before(tmp_path: Path, method: str) -> None:
    """In every batch and after the fit, whatever mixture somebody has set up."""
    module = Foreign(small_model())
    module.inner.model.layers[0].eval()
    module.inner.model.layers[1].mlp.experts.requires_grad_(False)
    module.inner.model.embed_tokens.requires_grad_(False)
    before = settings_of(module)

    class See(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            assert settings_of(pl_module) == before
            assert torch.is_grad_enabled()

    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], method, every=2, evaluation=loader(1))
    fit(module, tmp_path, pruning, See())
    assert len(pruning.records) == 2
    assert settings_of(module) == before


def traces(module: nn.Module) -> dict[str, Any]:
    """Everything a guest could have left behind."""
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    return {
        "hooks": {
            name: {kind: len(getattr(part, kind)) for kind in hooks if getattr(part, kind)}
            for name, part in module.named_modules()
        },
        # torch gives every module that has had a hook of some kinds a flag of its own
        "attributes": {name: sorted(vars(part)) for name, part in module.wrapped.named_modules()},  # type: ignore[operator, union-attr]
        "implementation": module.inner.get_experts_implementation(),  # type: ignore[operator, union-attr]
    }


@pytest.mark.parametrize("method", ["ean", "diep"])
def test_nothing_stays_after_a_fit(tmp_path: Path, method: str) -> None:
    module = Foreign(small_model())
    before = traces(module)
    optimizers: list[Any] = []
    module.make_optimizer = lambda p: optimizers.append(torch.optim.SGD(p, lr=0.1)) or optimizers[-1]  # type: ignore[func-returns-value]
    pruning = ExpertPruning(calibration(), 0.5, 2, method, every=2, cosine=True, evaluation=loader(1))
    fit(module, tmp_path, pruning)
    assert traces(module) == before
    assert all(not one._optimizer_step_pre_hooks and not one._optimizer_step_post_hooks for one in optimizers)


class Broken(list[Any]):
    """Text that ends in an error at its second batch, in the ``turn``-th pass."""

    def __init__(self, turn: int) -> None:
        super().__init__(Batches(2))
        self.left = turn

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        yield self[0]
        if self.left <= 0:
            raise Killed
        yield self[1]


@pytest.mark.parametrize("part", ["training", "calibration", "evaluation"])
@pytest.mark.parametrize("method", ["ean", "diep"])
def test_an_exception_leaves_no_trace(tmp_path: Path, method: str, part: str) -> None:
    """In the second round's calibration, in the midst of a measurement, or in a training step."""
    module = Foreign(small_model(), kill_at=3 if part == "training" else None)
    before, settings = traces(module), settings_of(module)
    optimizers: list[Any] = []
    module.make_optimizer = lambda p: optimizers.append(torch.optim.SGD(p, lr=0.1)) or optimizers[-1]  # type: ignore[func-returns-value]
    text: Any = Broken(4 if method == "diep" else 2) if part == "calibration" else calibration()
    pruning = ExpertPruning(
        text, 0.5, 2, method, every=2, cosine=True, evaluation=Broken(3) if part == "evaluation" else loader(1)
    )
    with pytest.raises(Killed):
        fit(module, tmp_path, pruning)
    assert traces(module) == before
    assert settings_of(module) == settings
    assert all(not one._optimizer_step_pre_hooks and not one._optimizer_step_post_hooks for one in optimizers)


# -------------------------------------------------------------------------------------------------- refusals

BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "reep"}, "Did you mean 'reap'"),
    ({"method": "diep-papr"}, "papr"),
    ({"method": "diep", "direction": "max"}, "direction"),
    ({"direction": "up"}, "direction"),
    ({"scope": "everywhere"}, "scope"),
    ({"spacing": "linear", "rounds": 2, "every": 1}, "spacing"),
    ({"optimizer": "keep"}, "optimizer"),
    ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
    ({"min_lr_ratio": 0.5}, "min_lr_ratio 0.5: where a cosine ends"),
    ({"rounds": 2, "at": [0, 5], "growth": 2.0}, "start, every and growth are then left out"),
    ({"cosine": True}, "cosine"),
    ({"cosine": True, "at": [3]}, "cosine"),
    ({"unit": "batches"}, "unit"),
    ({"rounds": 0}, "rounds"),
    ({"rounds": 2}, "every"),
    ({"rounds": []}, "rounds"),
    ({"rounds": [0.25, 0.4]}, "rounds"),
    ({"rounds": [0.5, 0.25]}, "rounds"),
    ({"start": -1}, "start"),
    ({"every": 0}, "every"),
    ({"every": 1, "growth": 0.0}, "growth"),
    ({"rounds": 2, "at": [3]}, "at"),
    ({"rounds": 2, "at": [3, 3]}, "at"),
    ({"rounds": 2, "at": [3, 1]}, "at"),
    ({"at": [-1]}, "at"),
    ({"at": [1], "every": 2}, "at"),
    ({"at": []}, "at"),
]


@pytest.mark.parametrize(("bad", "word"), BAD, ids=[str(bad) for bad, _ in BAD])
def test_bad_arguments_are_said_at_once(bad: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as said:
        ExpertPruning(calibration(), **bad)
    assert word in str(said.value) and "\n" not in str(said.value)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0.0}, "ratio"),
    ({"ratio": 1.0}, "ratio"),
    ({"ratio": 0.01}, "drops nothing"),
    ({"ratio": 0.9}, "possible ratios"),  # more than top-2 routers can do without
    ({"ratio": 0.5, "scope": "global", "floor": 5}, "possible ratios"),
    ({"floor": 0}, "floor"),
    ({"floor": 9}, "floor"),
    ({"rounds": 16, "every": 1}, "round 1 of 16"),
]


@pytest.mark.parametrize(("bad", "word"), IMPOSSIBLE, ids=[str(bad) for bad, _ in IMPOSSIBLE])
def test_impossible_schedules_are_said_before_training(tmp_path: Path, bad: dict[str, Any], word: str) -> None:
    """They depend on the model, which is there only once the fit begins; its first step must not be."""
    module = Foreign(small_model())
    before = state_of(module)
    with pytest.raises(InputError) as said:
        fit(module, tmp_path, ExpertPruning(calibration(), folder=tmp_path / "out", **({"start": 2} | bad)))
    assert word in str(said.value) and "\n" not in str(said.value)
    assert module.losses == [] and not (tmp_path / "out").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("model", ["dense", "none"])
def test_a_model_without_experts_is_refused(tmp_path: Path, model: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    module = Foreign(dense if model == "dense" else nn.Linear(2, 2))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises((InputError, TypeError), match=r"no MoE layers|no Hugging Face model"):
        fit(module, tmp_path, ExpertPruning(calibration(), start=3))
    assert module.losses == []


# ------------------------------------------------------------------------------------------------ any text


class OtherNames(Foreign):
    """Somebody whose training batches have other names."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step({"input_ids": batch["tokens"] if isinstance(batch, dict) else batch}, batch_idx)


@pytest.mark.parametrize("tensors", [False, True])
def test_steps_ask_nothing_of_the_training_batches(tmp_path: Path, tensors: bool) -> None:
    """Only rounds by tokens must be able to count them."""
    data = [batch["input_ids"] if tensors else {"tokens": batch["input_ids"]} for batch in Batches(4)]
    pruning = ExpertPruning(calibration(), 0.25, method="rwn", start=2)
    fit(OtherNames(small_model()), tmp_path, pruning, data=DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    assert steps_of(pruning) == [2]
    assert pruning.records[0].steps == 2


def test_rounds_by_tokens_say_what_they_need(tmp_path: Path) -> None:
    data = DataLoader([{"tokens": batch["input_ids"]} for batch in Batches(4)], batch_size=None)  # type: ignore[arg-type]
    pruning = ExpertPruning(calibration(), 0.25, method="rwn", unit="tokens", start=2 * TOKENS)
    with pytest.raises(TypeError, match="ExpertPruning: to count tokens"):
        fit(OtherNames(small_model()), tmp_path, pruning, data=data)


def test_text_as_a_config_says_it(tmp_path: Path) -> None:
    """Everything of a YAML, the datamodules inside the callback's own arguments."""
    save_tokenizer(tmp_path / "tokenizer")
    text = write_text(tmp_path / "text.txt", documents(40))
    module: dict[str, Any] = {
        "class_path": "lightning_moe.data.datamodule.TextDataModule",
        "init_args": {
            "path": str(text),
            "tokenizer": str(tmp_path / "tokenizer"),
            "seq_len": 16,
            "samples": 4,
            "batch_size": 2,
        },
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    config = {
        "class_path": "lightning_moe.callbacks.ExpertPruning",
        "init_args": {
            "calibration": module,
            "evaluation": module,
            "ratio": 0.5,
            "rounds": [0.25, 0.5],
            "method": "ean",
            "every": 2,
            "folder": str(tmp_path / "out"),
            "cosine": False,
        },
    }
    pruning = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert isinstance(pruning, ExpertPruning) and isinstance(pruning.calibration, TextDataModule)
    fit(Foreign(tiny_model("mixtral", vocab_size=VOCAB, intermediate_size=8).train()), tmp_path, pruning)
    plain = TextDataModule(**module["init_args"])
    plain.setup("predict")
    other = ExpertPruning(list(plain.predict_dataloader()), 0.5, [0.25, 0.5], "ean", every=2)
    fit(Foreign(tiny_model("mixtral", vocab_size=VOCAB, intermediate_size=8).train()), tmp_path, other)
    assert [record.scores for record in pruning.records] == [record.scores for record in other.records]
    assert pruning.records[0].perplexity["before_prune"]["tokens"] == 4 * 15


# ---------------------------------------------------------------------------------------------- other guests


def fit_with(guest: Callback, folder: Path, family: str, method: str, first: bool) -> tuple[ExpertPruning, Trainer]:
    """Two rounds in six steps, the pruning before the other guest or after it."""
    module = Foreign(small_model(family))
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], method, every=2, evaluation=loader(2, seed=9))
    trainer = fit(module, folder, *([pruning, guest] if first else [guest, pruning]))
    assert counts(module.inner) == [4, 4]
    return pruning, trainer


@pytest.mark.parametrize("first", [False, True], ids=["pruned after it", "pruned before it"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_load_of_training_is_all_that_is_watched(tmp_path: Path, family: str, first: bool) -> None:
    """Whatever the order: what a round reads for itself is no load, and its step's look is at the experts before."""
    monitor = ExpertUsageMonitor(every_n_steps=1)
    fit_with(monitor, tmp_path, family, "ean", first)
    looks = [list(look.values()) for _, _, look in monitor.looks]
    assert [[len(count_E) for count_E in look] for look in looks] == [[6, 6]] * 2 + [[4, 4]] * 4
    assert [[sum(count_E) for count_E in look] for look in looks] == [[TOP_K * TOKENS] * 2] * 6


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("method", ["ean", "diep"])
def test_a_round_keeps_no_balance(tmp_path: Path, method: str, family: str) -> None:
    """The routers' losses join the training and nothing that a round reckons, whatever the order."""
    found = []
    for first in (False, True):
        guest = RouterRebalance(load_balance=1.0, z_loss=1.0, bias_step=0.01)
        pruning, trainer = fit_with(guest, tmp_path, family, method, first)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert any(name.startswith("router_rebalance") for name in logged)
        found.append(([record.scores for record in pruning.records], logged))
    assert found[0] == found[1]


def test_weights_frozen_by_another_guest_learn_again_afterwards(tmp_path: Path) -> None:
    """RouterRebalance trains the routers alone, for the time of the fit."""
    module = Foreign(small_model())
    whole = state_of(module.inner)
    pruning = ExpertPruning(calibration(), 0.5, 2, "ean", every=2)
    fit(module, tmp_path, RouterRebalance(train="routers"), pruning)
    for layer in find_moe_layers(module.inner):
        for name, stack in layer.experts.named_parameters():
            assert torch.equal(stack, whole[f"{layer.name}.experts.{name}"][pruning.keep[layer.name]]), name
    assert [name for name, parameter in module.named_parameters() if not parameter.requires_grad] == []


def test_recomputed_activations(tmp_path: Path) -> None:
    """Gradient checkpointing: layers are in training mode only while the model trains."""
    for method in ("ean", "diep"):
        plain, again = Foreign(small_model()), Foreign(small_model())
        again.inner.gradient_checkpointing_enable({"use_reentrant": False})
        guests = [ExpertPruning(calibration(), 0.5, 2, method, every=2) for _ in range(2)]
        for module, pruning in zip((plain, again), guests, strict=True):
            fit(module, tmp_path, pruning)
        assert guests[0].keep == guests[1].keep
        assert again.losses == pytest.approx(plain.losses, rel=1e-4)


def test_mixed_precision(tmp_path: Path) -> None:
    """Scores are those of the precision that the fit runs in; sums stay exact."""
    for method in ("ean", "diep"):
        module, pruning = Foreign(small_model()), ExpertPruning(calibration(), 0.5, method=method, evaluation=loader(1))
        fit(module, tmp_path, pruning, precision="bf16-mixed", max_steps=1)
        assert counts(module.inner) == [4, 4]
        assert {parameter.dtype for parameter in module.inner.parameters()} == {torch.float32}
        if method == "ean":
            plain = ExpertPruning(calibration(), 0.5, method=method)
            fit(Foreign(small_model()), tmp_path, plain, max_steps=1)
            for name, scores in pruning.records[0].scores.items():
                assert scores != plain.records[0].scores[name]
                assert list(scores.values()) == pytest.approx(list(plain.records[0].scores[name].values()), rel=0.1)
