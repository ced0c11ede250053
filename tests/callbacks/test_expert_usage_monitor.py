"""ExpertUsageMonitor as a guest: its looks are the counts of the routers' outputs, each token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.errors import InputError
from tests.callbacks.router_fit import LENGTH, STEPS, loader, traces, trainer
from tests.callbacks.usage_fit import Foreign, figures_of, summed
from tests.helpers.families import TOP_K, tiny_model
from tests.helpers.training_models import training_model

# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
def test_looks_are_the_counts_of_the_routers(tmp_path: Path, masked: bool, pruned: bool, recompute: bool) -> None:
    """Every step a look, of the tokens of that step alone, padding left out, each token once."""
    module, monitor = Foreign(training_model(pruned=pruned, recompute=recompute)), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader(masked))
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", step) for step in range(1, STEPS + 1)]
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches
    sizes = [4, 6] if pruned else [8, 8]
    assert [len(count_E) for count_E in monitor.last.values()] == sizes
    tokens = 2 * LENGTH - (5 if masked else 0)
    assert all(sum(count_E) == TOP_K * tokens for count_E in monitor.last.values())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "ernie4_5_moe", "jamba"])
def test_other_families(tmp_path: Path, family: str) -> None:
    module, monitor = Foreign(training_model(family, pruned=True)), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [step for _, step, _ in monitor.looks] == [2, 4]
    assert monitor.looks[0][2] == summed(module.batches[:2], "train")
    assert monitor.looks[1][2] == summed(module.batches[2:], "train")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_look_sees_all_tokens_since_the_last(tmp_path: Path, accumulate: int) -> None:
    """Steps are those of the optimiser."""
    module, monitor = Foreign(training_model()), ExpertUsageMonitor(every_n_steps=2)
    trainer(tmp_path, monitor, max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loader())
    assert [step for _, step, _ in monitor.looks] == ([2, 4, 6, 8] if accumulate == 1 else [2, 4])
    for turn, (_, _, counts) in enumerate(monitor.looks):
        assert counts == summed(module.batches[turn * 2 * accumulate : (turn + 1) * 2 * accumulate], "train")


def test_reentrant_recomputing_is_counted_once(tmp_path: Path) -> None:
    model = training_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    module, monitor = Foreign(model), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches


def test_a_model_in_evaluation_mode_is_seen_too(tmp_path: Path) -> None:
    module, monitor = Foreign(tiny_model("mixtral")), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(module, loader())
    assert [("train", counts) for _, _, counts in monitor.looks] == module.batches


def test_two_backward_passes_in_a_step(tmp_path: Path) -> None:
    """Manual optimisation: the forward after the first backward pass counts as well."""

    class Manual(Foreign):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            for row in (slice(0, 1), slice(1, 2)):
                self.manual_backward(self.run({"input_ids": batch["input_ids"][row]}, "train"))
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    module, monitor = Manual(training_model(recompute=True)), ExpertUsageMonitor(every_n_steps=1)
    trainer(tmp_path, monitor, max_steps=1).fit(module, loader(masked=False))
    assert monitor.last == summed(module.batches, "train")


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Weights after training are the same bit by bit."""
    weights = []
    for guests in ([], [ExpertUsageMonitor(every_n_steps=1)]):
        module = Foreign(training_model())
        torch.manual_seed(0)
        trainer(tmp_path, *guests).fit(module, loader())
        weights.append(module.inner.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# ----------------------------------------------------------------------------------------- validation


def test_a_validation_loop_is_one_look(tmp_path: Path) -> None:
    """Of all its loaders; the sanity check is none, and training counts nothing meanwhile."""
    module, monitor = Foreign(training_model()), ExpertUsageMonitor(every_n_steps=2)
    run = trainer(tmp_path, monitor, val_check_interval=2)
    run.fit(module, loader(), [loader(seed=1), loader(masked=False, seed=2)])
    assert [(kind, step) for kind, step, _ in monitor.looks] == [("train", 2), ("val", 2), ("train", 4), ("val", 4)]
    kinds = [kind for kind, _ in module.batches]
    validations = [kinds.index("val"), len(kinds) - 2 * STEPS]
    assert "sanity" in kinds
    for look, start in zip(monitor.looks[1::2], validations, strict=True):
        assert look[2] == summed(module.batches[start : start + 2 * STEPS], "val")
        assert all(sum(count_E) == TOP_K * STEPS * (19 + 24) for count_E in look[2].values())
    training = [one for one in module.batches if one[0] == "train"]
    assert monitor.looks[0][2] == summed(training[:2], "train")
    assert monitor.looks[2][2] == summed(training[2:], "train")


def test_validation_alone(tmp_path: Path) -> None:
    module, monitor = Foreign(training_model()), ExpertUsageMonitor()
    before = traces(module)
    run = trainer(tmp_path, monitor)
    run.validate(module, loader(), verbose=False)
    assert monitor.looks == [("val", 0, summed(module.batches, "val"))]
    expected = figures_of(monitor.last, "expert_usage_val")
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert traces(module) == before


# --------------------------------------------------------------------------------------------- manners


def test_nothing_stays(tmp_path: Path) -> None:
    module = Foreign(training_model("deepseek_v3"))
    before = traces(module)
    trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage", 1)).fit(module, loader(), loader(seed=1))
    assert traces(module) == before


@pytest.mark.parametrize("kind", ["train", "val"])
def test_an_exception_leaves_no_trace(tmp_path: Path, kind: str) -> None:
    class Fails(Foreign):
        def run(self, batch: dict[str, Tensor], own: str) -> Tensor:
            if own == kind and len(self.batches) > 2:
                raise RuntimeError("out of memory")
            return super().run(batch, own)

    module = Fails(training_model())
    before = traces(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        run = trainer(tmp_path, ExpertUsageMonitor(tmp_path / "usage", 1), val_check_interval=1)
        run.fit(module, loader(), loader(seed=1))
    assert traces(module) == before
    assert not (tmp_path / "usage").exists()


def test_bad_arguments_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ExpertUsageMonitor: every_n_steps 0: at least 1"):
        ExpertUsageMonitor(every_n_steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file, not a folder"):
        ExpertUsageMonitor(tmp_path / "file")


def test_no_model_inside_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ExpertUsageMonitor: Foreign holds no Hugging Face model"):
        trainer(tmp_path, ExpertUsageMonitor()).fit(Foreign(nn.Linear(2, 2)), loader())
