"""ExpertPruning and the optimisers of somebody's fit: what they know, and what they train."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lightning_moe.callbacks import ExpertPruning
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from tests.callbacks.foreign_fit import Foreign, Look, calibration, counts, fit, loader, small_model, steps_of
from tests.helpers.families import tiny_model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True)


def known(trainer: Trainer, module: Foreign) -> dict[str, dict[str, Tensor]]:
    """What the optimisers hold of each parameter by now, by its name."""
    names = {id(parameter): name for name, parameter in module.inner.named_parameters()}
    return {
        names[id(parameter)]: {name: torch.as_tensor(value).clone() for name, value in state.items()}
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
    }


# ---------------------------------------------------------------------------------------------------- carry


@pytest.mark.parametrize("make", [adamw, momentum, torch.optim.Adam, torch.optim.Adafactor])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_carry_keeps_what_is_known_of_kept_slices(
    tmp_path: Path, family: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    """Each tensor of the state is the old one, cut along the experts if it goes along them."""
    before, after = Look(known), Look(known)
    pruning = ExpertPruning(calibration(), 0.5, method="ean", start=3, optimizer="carry", scope="global")
    module = Foreign(small_model(family), make)
    fit(module, tmp_path, before, pruning, after)
    old, new = before.seen[2], after.seen[2]
    assert old.keys() == new.keys() == dict(module.inner.named_parameters()).keys()
    cut = 0
    for name, state in old.items():
        assert state.keys() == new[name].keys()
        keep = next((ids for layer, ids in pruning.keep.items() if name.startswith(f"{layer}.")), [])
        for part, value in state.items():
            if keep and value.dim() > 0 and value.shape[0] == 8:
                value = value[keep]
                cut += 1
            assert torch.equal(new[name][part], value), (name, part)
    assert cut >= 6


class Blocks(torch.optim.SGD):
    """Knows something of every eight numbers in a row, as optimisers of 8 bits do, and nothing of experts."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["scales"] = torch.ones(parameter.numel() // 8)
        return loss


def test_what_cannot_be_cut_is_not_carried(tmp_path: Path) -> None:
    """Rather than be read wrongly from then on."""
    pruning = ExpertPruning(calibration(), 0.5, method="rwn", start=2, optimizer="carry")
    with pytest.raises(InputError, match="reset") as said:
        fit(Foreign(small_model(), lambda parameters: Blocks(parameters, lr=0.1)), tmp_path, pruning)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("make", [adamw, momentum])
def test_carry_goes_on_as_if_the_unused_had_never_been(
    tmp_path: Path, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    """Experts that no token ever reaches: cut in the midst of a fit or before it, the rest trains alike.

    Bitwise it does not: this router reckons in float32, and its matrix has fewer rows.
    """

    def model() -> PreTrainedModel:
        network = tiny_model("dots1").train().double()
        network.set_experts_implementation("eager")  # which knows float64
        with torch.no_grad():
            for layer in find_moe_layers(network):
                (bias,) = layer.correction_biases
                bias[[0, 3, 4, 6]] = -1e4
        return network

    whole, cut = model(), model()
    keep = {layer.name: [1, 2, 5, 7] for layer in find_moe_layers(cut)}
    keep_experts(cut, keep)
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "euf", at=[2, 5], optimizer="carry")
    one, two = (Foreign(network, make, lambda o: StepLR(o, 2, 0.5)) for network in (whole, cut))
    fit(one, tmp_path, pruning)
    fit(two, tmp_path)
    assert pruning.keep == keep
    assert one.losses == pytest.approx(two.losses, rel=1e-7)
    for (name, left), right in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_carry_keeps_groups_and_schedules(tmp_path: Path) -> None:
    """A group of its own for the routers stays that group; the schedule goes on."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        routers = {id(layer.router_weight) for layer in find_moe_layers(module.inner)}
        mine, others = ([p for p in parameters if (id(p) in routers) == own] for own in (True, False))
        return torch.optim.AdamW([{"params": mine, "lr": 1e-3, "weight_decay": 0.0}, {"params": others}], lr=1e-2)

    module = Foreign(small_model(), make, lambda optimizer: StepLR(optimizer, 1, 0.5))

    def look(trainer: Trainer, module: Foreign) -> Any:
        groups = trainer.optimizers[0].param_groups
        routers = [layer.router_weight for layer in find_moe_layers(module.inner)]
        assert len(groups[0]["params"]) == len(routers)
        assert all(left is right for left, right in zip(groups[0]["params"], routers, strict=True))
        return [group["lr"] for group in groups]

    looks = Look(look)
    fit(module, tmp_path, ExpertPruning(calibration(), 0.5, 2, "rwn", every=2, optimizer="carry"), looks)
    assert looks.seen == [[1e-3 * 0.5**step, 1e-2 * 0.5**step] for step in range(1, 7)]


# ---------------------------------------------------------------------------------------------------- reset


def test_reset_knows_nothing_and_starts_the_schedule(tmp_path: Path) -> None:
    made: list[Any] = []
    module = Foreign(small_model(), lambda p: made.append(adamw(p)) or made[-1], lambda o: StepLR(o, 1, 0.5))
    looks = Look(lambda trainer, module: (len(known(trainer, module)), trainer.optimizers[0].param_groups[0]["lr"]))
    fit(module, tmp_path, ExpertPruning(calibration(), 0.5, 2, "rwn", start=2, every=2), looks)
    everything = len(list(module.inner.parameters()))
    assert [state for state, _ in looks.seen] == [everything, 0, everything, 0, everything, everything]
    assert [rate for _, rate in looks.seen] == [1e-2 * factor for factor in (0.5, 1, 0.5, 1, 0.5, 0.25)]
    assert len(made) == 3


def test_a_schedule_by_epochs_starts_anew_too(tmp_path: Path) -> None:
    """The first epoch after a round is trained at the highest rate, as the first of all was."""
    rates: list[float] = []

    class Recording(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    module = Recording(small_model(), adamw, lambda optimizer: StepLR(optimizer, 1, 0.5), "epoch")
    pruning = ExpertPruning(calibration(), 0.25, 2, "rwn", unit="epochs", start=2, every=1)
    fit(module, tmp_path, pruning, data=loader(1), max_epochs=5)
    assert steps_of(pruning) == [2, 3]
    assert rates == [1e-2 * factor for factor in (1, 0.5, 1, 1, 0.5)]


def test_reset_is_a_new_fit(tmp_path: Path) -> None:
    """What follows a round equals a fit of its own that starts from the weights then."""
    moments: list[PreTrainedModel] = []
    look = Look(lambda trainer, module: moments.append(copy.deepcopy(module.inner)))
    module = Foreign(small_model(), adamw, lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    fit(module, tmp_path, ExpertPruning(calibration(), 0.5, method="ean", start=2), look)
    again = Foreign(moments[1], adamw, lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    fit(again, tmp_path, data=DataLoader(list(loader(6))[2:], batch_size=None))  # type: ignore[arg-type]
    assert again.losses == module.losses[2:]
    for (name, left), right in zip(module.inner.state_dict().items(), again.inner.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


# ------------------------------------------------------------------------------------------- both of them


class Manual(Foreign):
    """Somebody's two optimisers, stepped by hand: the experts have their own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        both: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in both:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        named = list(self.inner.named_parameters())
        return [adamw([p for name, p in named if ("experts" in name) == own]) for own in (True, False)]


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
@pytest.mark.parametrize("kind", [Foreign, Manual])
def test_all_that_is_trained_is_in_the_model(tmp_path: Path, kind: type[Foreign], optimizer: Any) -> None:
    """At every moment the optimisers hold the model's parameters, each once, and all of them move."""

    def look(trainer: Trainer, module: Foreign) -> dict[str, Tensor]:
        held = [id(p) for one in trainer.optimizers for group in one.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in module.inner.parameters())
        return {name: p.detach().clone() for name, p in module.inner.named_parameters()}

    looks = Look(look)
    module = Manual(small_model()) if kind is Manual else Foreign(small_model(), adamw)
    # Each optimiser counts its own step.
    pruning = ExpertPruning(calibration(), 0.5, 2, "ean", start=2, every=2, scope="global", optimizer=optimizer)
    fit(module, tmp_path, pruning, looks)
    assert len(pruning.records) == 2
    assert sum(counts(module.inner)) == 8
    for before, after in zip(looks.seen, looks.seen[1:], strict=False):
        for name in before:
            assert before[name].shape != after[name].shape or not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("optimizer", ["carry", "reset"])
def test_frozen_weights_stay_frozen(tmp_path: Path, optimizer: Any) -> None:
    model = small_model()
    frozen = [name for name, _ in model.named_parameters() if "layers.0" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    pruning = ExpertPruning(calibration(), 0.5, [0.25, 0.5], "ean", every=2, optimizer=optimizer)
    before = model.get_parameter("model.layers.0.mlp.experts.down_proj").clone()
    fit(Foreign(model, adamw), tmp_path, pruning)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before[pruning.keep["model.layers.0.mlp"]])


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_nothing_before_a_round_stays_in_memory(tmp_path: Path, optimizer: Any, cosine: bool) -> None:
    """At the end of every step there is one optimiser, and experts of one number, those of the model."""
    optimizers: list[weakref.ref[Any]] = []
    stacks: list[weakref.ref[Any]] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(weakref.ref(made := adamw(parameters)))
        return made

    def note(trainer: Trainer, module: Foreign) -> None:
        stacks.extend(weakref.ref(parameter) for parameter in module.inner.parameters() if parameter.dim() == 3)

    def alive(trainer: Trainer, module: Foreign) -> tuple[int, set[int]]:
        note(trainer, module)
        gc.collect()
        left = [stack for stack in (one() for one in stacks) if stack is not None]
        return sum(one() is not None for one in optimizers), {stack.shape[0] for stack in left}

    pruning = ExpertPruning(calibration(), 0.5, 2, "rwn", start=2, every=2, optimizer=optimizer, cosine=cosine)
    looks = Look(alive)
    fit(Foreign(small_model(), make, lambda o: StepLR(o, 1, 0.5)), tmp_path, Look(note), pruning, looks)
    assert len(optimizers) == (3 if optimizer == "reset" else 1)
    assert looks.seen == [(1, {size}) for size in (8, 6, 6, 4, 4, 4)]
