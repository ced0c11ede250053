"""``moe_fsdp`` in somebody's own project, on two processes: it trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_moe.errors import InputError
from lightning_moe.strategies import MoEFSDPStrategy, check_strategy
from tests.helpers.foreign_ranks import alone, on_ranks

Figures = dict[str, Any]


class Runs(NamedTuple):
    """What one process found, and two, and the folder of their checkpoints."""

    one: Figures
    two: Figures
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("foreign")
    return Runs(alone(folder), on_ranks("two", folder, 2), folder)


def weights_differ(one: Figures, other: Figures) -> float:
    """The largest relative difference in the sum, or the sum of squares, of a parameter."""
    assert one["weights"].keys() == other["weights"].keys()
    pairs = [zip(one["weights"][name], other["weights"][name], strict=True) for name in one["weights"]]
    return max(abs(mine - yours) / max(abs(yours), 1e-3) for pair in pairs for mine, yours in pair)


def same_fit(found: Figures, wanted: Figures) -> None:
    """Losses, weights, and the loss validated after them, which stale weights would show."""
    assert found["split"]
    assert found["alike"]
    assert found["losses"] == pytest.approx(wanted["losses"][-len(found["losses"]) :], abs=2e-5)
    assert found["validated"] == pytest.approx(wanted["validated"], abs=2e-5)
    assert weights_differ(found, wanted) < 1e-4


HOW = ["automatic", "clipped", "clipped by value", "accumulated", "by hand", "toggled", "headed", "parted", "taught"]
HOW += ["two epochs", "tied"]


@pytest.mark.parametrize("how", HOW)
def test_trains_as_one_process(runs: Runs, how: str) -> None:
    assert not runs.one[how]["split"]
    same_fit(runs.two[how], runs.one[how])


def test_gradients_are_averaged_before_anybody_sees_them(runs: Runs) -> None:
    """Those of heads that have one on a single rank too."""
    one, two = runs.one["parted"]["seen"], runs.two["parted"]["seen"]
    assert len(one) == 4 and all(len(step) == 2 for step in one)
    for step, other in zip(one, two, strict=True):
        assert other == pytest.approx(step, rel=1e-4, abs=1e-6)


def test_every_moe_in_the_module_is_split(runs: Runs) -> None:
    assert runs.two["taught"]["split"] > 1.5 * runs.two["automatic"]["split"]


@pytest.mark.parametrize("how", ["clipped", "clipped by value"])
def test_clipping_clipped(runs: Runs, how: str) -> None:
    assert weights_differ(runs.two[how], runs.two["automatic"]) > 1e-3


def test_mixed_precision(runs: Runs) -> None:
    one, two = runs.one["mixed"], runs.two["mixed"]
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-3)
    assert two["validated"] == pytest.approx(one["validated"], abs=2e-3)
    assert two["losses"] != runs.two["automatic"]["losses"]


@pytest.mark.parametrize("how", ["recomputed", "offloaded"])
def test_what_saves_memory_changes_nothing(runs: Runs, how: str) -> None:
    """Activations computed anew; weights in the memory of the CPU."""
    assert runs.two[how]["losses"] == pytest.approx(runs.two["automatic"]["losses"], abs=1e-6)
    assert weights_differ(runs.two[how], runs.two["automatic"]) < 1e-5


def test_measures_the_weights_it_has(runs: Runs) -> None:
    """Before, within, between and after two fits of one Trainer; the last figure of each is the exported model's."""
    one, two = runs.one["looked at"], runs.two["looked at"]
    for moment in ("before", "first", "second"):
        assert two[moment] == pytest.approx([one[moment][0]] * len(two[moment]), abs=2e-5), moment
    assert len({round(two[moment][0], 3) for moment in ("before", "first", "second")}) == 3
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5)


@pytest.mark.parametrize("how", ["False", "True", "kept"])
def test_goes_on_from_a_checkpoint(runs: Runs, how: str) -> None:
    """Of parts, of one file, or of ``ModelCheckpoint``: as if it had not been stopped."""
    whole, resumed = runs.two["two epochs"], runs.two[f"resumed, {how}"]
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], abs=1e-6)
    assert resumed["alike"]
    assert weights_differ(resumed, whole) < 1e-6


def test_a_save_that_fails_half_way_leaves_the_older_one(runs: Runs) -> None:
    assert weights_differ(runs.two["interrupted"], runs.two["two epochs"]) < 1e-6


def test_goes_on_from_one_process(runs: Runs) -> None:
    """Which knew nothing of us, with tied weights under two names."""
    assert len(runs.two["resumed, one"]["losses"]) == 2
    same_fit(runs.two["resumed, one"], runs.one["tied"])


def test_one_process_goes_on_from_two(runs: Runs) -> None:
    back = on_ranks("back", runs.folder, 1)
    for full in ("False", "True"):
        assert len(back[full]["losses"]) == 2
        same_fit(back[full], runs.one["two epochs"])


@pytest.mark.scale
def test_replicas(runs: Runs) -> None:
    """Four processes, of which two and two hold the model."""
    four = on_ranks("four", runs.folder, 4)
    for how in ("automatic", "clipped", "headed"):
        same_fit(four[how], runs.one[how])
    assert len(four["resumed"]["losses"]) == 2
    same_fit(four["resumed"], runs.one["two epochs"])


REFUSED = {
    "no part": ["cannot be loaded", "__1_0.distcp"],
    "cut part": ["cannot be loaded"],
    "no list": ["no whole checkpoint", "was its saving killed?"],
    "cut list": ["no whole checkpoint", "was its saving killed?"],
    "cut record": ["cannot be loaded"],
    "empty record": ["cannot be loaded"],
    "no record": ["cannot be loaded"],
    "nothing in it": ["no whole checkpoint"],
    "cut file": ["no whole checkpoint"],
    "absent": ["no such checkpoint"],
    "experts, parts": ["another plan", "(8, 32)", "(6, 32)"],
    "experts, file": ["another plan", "(8, 32)", "(6, 32)"],
    "more, parts": ["another model", "layers.2", "only here"],
    "more, file": ["another model", "layers.2", "only here"],
    "fewer, parts": ["another model", "layers.1", "only there"],
    "fewer, file": ["another model", "layers.1", "only there"],
    "optimisers, parts": ["cannot be loaded", "optimizer_0"],
    "optimisers, file": ["cannot be loaded"],
    "precision": ["--trainer.precision 16-true", "bf16-mixed"],
    "replicas": ["2 ranks", "3 replicas"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_on_all_ranks_in_one_line(runs: Runs, what: str) -> None:
    first, second = runs.two["refused"][what]
    assert first == second
    kind, said = first
    assert kind == "InputError", said
    assert "\n" not in said
    assert all(word in said for word in REFUSED[what]), said


def test_all_refusals_are_known(runs: Runs) -> None:
    assert runs.two["refused"].keys() == REFUSED.keys()


def test_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="replicas 0: at least 1"):
        MoEFSDPStrategy(replicas=0)
    with pytest.raises(InputError, match="quantize 'fp3': one of nf4, int8"):
        MoEFSDPStrategy(quantize="fp3")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_would_mislead(strategy: Any) -> None:
    with pytest.raises(InputError, match="moe_fsdp"):
        check_strategy(strategy)


@pytest.mark.parametrize("strategy", [None, "auto", "ddp", "moe_fsdp", MoEFSDPStrategy()])
def test_strategies_that_do(strategy: Any) -> None:
    check_strategy(strategy)


def test_lightning_knows_its_name() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="moe_fsdp", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, MoEFSDPStrategy)
