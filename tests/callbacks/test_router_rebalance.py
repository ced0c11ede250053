"""RouterRebalance as a guest: its losses train anybody's model as if added by hand, and it goes without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.callbacks.router_rebalance import RouterRebalance
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.router_losses import gate_entropy_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, record_routing
from tests.callbacks.rebalance_fit import ByHand, Foreign, Gradients, assert_differ, assert_same, gradients
from tests.callbacks.router_fit import loader, traces, trainer
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.training_models import training_model

# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_train_as_if_added_by_hand(
    tmp_path: Path, accumulate: int, masked: bool, pruned: bool, recompute: bool
) -> None:
    kwargs: dict[str, Any] = {"masked": masked, "accumulate_grad_batches": accumulate}
    model = training_model("mixtral", pruned, recompute)
    guest = gradients(tmp_path, Foreign(model), RouterRebalance(0.5, z_loss=0.2, entropy=0.3), **kwargs)
    hand = gradients(tmp_path, ByHand(training_model("mixtral", pruned, recompute), 0.5, 0.2, 0.3), **kwargs)
    assert len(guest.steps) == 4 // accumulate
    assert_same(guest, hand)
    plain = gradients(tmp_path, Foreign(training_model("mixtral", pruned, recompute)), **kwargs)
    assert_differ(guest, plain, model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_every_family_trains_as_if_added_by_hand(tmp_path: Path, family: str) -> None:
    found = []
    for module, guests in (
        (Foreign(training_model(family, pruned=True)), [RouterRebalance(0.5, z_loss=0.2, entropy=0.3)]),
        (ByHand(training_model(family, pruned=True), 0.5, 0.2, 0.3), []),
    ):
        torch.manual_seed(0)  # PhiMoE draws random numbers while it trains
        found.append(gradients(tmp_path, module, *guests, max_steps=2))
    assert_same(*found)


def test_what_is_logged_is_the_mean_over_layers(tmp_path: Path) -> None:
    """Of the losses before their weights, of the batch at hand."""
    values: list[dict[str, float]] = []

    class Recorded(Foreign):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            routings: list[Routing] = []
            with record_routing(find_moe_layers(self.inner), lambda _, routing: routings.append(routing)):
                loss = super().training_step(batch, batch_idx)
            mask_T = batch["attention_mask"].flatten()
            losses = {"load_balance": load_balance_loss, "z_loss": router_z_loss, "entropy": gate_entropy_loss}
            means = {
                name: sum(float(one(routing, mask_T).detach()) for routing in routings) / len(routings)
                for name, one in losses.items()
            }
            values.append({f"router_rebalance/{name}": value for name, value in means.items()})
            return loss

    for recompute in (False, True):
        values.clear()
        model = training_model("mixtral", pruned=True, recompute=recompute)
        guest = RouterRebalance(0.5, z_loss=0.1, entropy=0.1)
        found = gradients(tmp_path, Recorded(model), guest, accumulate_grad_batches=2)
        assert len(found.logged) == 4
        # Metrics of a batch are there for others once the next one is through.
        for logged, expected in zip(found.logged[1:], values, strict=False):
            assert logged == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_zero_is_no_guest_at_all(tmp_path: Path) -> None:
    idle = gradients(tmp_path, Foreign(training_model("mixtral")), RouterRebalance(0.0))
    plain = gradients(tmp_path, Foreign(training_model("mixtral")))
    for one, other in zip(idle.steps, plain.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert idle.logged == [{}] * 4


def test_a_model_in_evaluation_mode_is_balanced_too(tmp_path: Path) -> None:
    """``from_pretrained`` gives models in evaluation mode, and Lightning leaves them in it: most guests' case."""
    model = tiny_model("mixtral")
    assert not model.training
    guest = gradients(tmp_path, Foreign(model), RouterRebalance(0.5))
    assert_same(guest, gradients(tmp_path, ByHand(tiny_model("mixtral"), 0.5)))


def test_reentrant_recomputing_is_balanced_too(tmp_path: Path) -> None:
    """The first forward then builds no graph; the one in the backward pass does."""

    def made() -> PreTrainedModel:
        model = training_model("mixtral")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        return model

    guest = gradients(tmp_path, Foreign(made()), RouterRebalance(0.5))
    assert_same(guest, gradients(tmp_path, ByHand(training_model("mixtral"), 0.5)))


def test_validation_in_between_adds_nothing(tmp_path: Path) -> None:
    model = training_model("mixtral")
    found = Gradients()
    run = trainer(tmp_path, found, RouterRebalance(0.5), val_check_interval=1, num_sanity_val_steps=0)
    run.fit(Foreign(model), loader(), loader())
    assert_same(found, gradients(tmp_path, ByHand(training_model("mixtral"), 0.5)))


def test_manual_optimisation(tmp_path: Path) -> None:
    """Two backward passes in a step, each with the losses of its forward."""

    def manual(base: Any) -> Any:
        class Manual(base):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.automatic_optimization = False

            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
                for row in (slice(0, 1), slice(1, 2)):
                    self.manual_backward(super().training_step({"input_ids": batch["input_ids"][row]}, batch_idx))
                optimizer: Any = self.optimizers()
                optimizer.step()
                optimizer.zero_grad()

        return Manual

    guest = gradients(tmp_path, manual(Foreign)(training_model("mixtral")), RouterRebalance(0.5), masked=False)
    hand = gradients(tmp_path, manual(ByHand)(training_model("mixtral"), 0.5), masked=False)
    assert_same(guest, hand)


def test_the_scaler_of_16_bit_training_scales_the_losses_too(tmp_path: Path) -> None:
    """Gradients after unscaling are those of the losses added by hand; a scale left out would be a factor of 1024."""
    found = []
    for module, guests in (
        (Foreign(training_model("mixtral")), [RouterRebalance(0.5)]),
        (ByHand(training_model("mixtral"), 0.5), []),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        kwargs: dict[str, Any] = {"accumulate_grad_batches": 2, "plugins": [plugin]}
        found.append(gradients(tmp_path, module, *guests, **kwargs))
    for one, other in zip(found[0].steps, found[1].steps, strict=True):
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=0.05, atol=1e-3, msg=name)


# --------------------------------------------------------------------------------------------- manners


class Fails(Foreign):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("train", ["all", "routers", "routers+norms"])
def test_an_exception_leaves_no_trace(tmp_path: Path, train: Any) -> None:
    module = Fails(training_model("deepseek_v3"))
    before = traces(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, RouterRebalance(0.5, bias_step=0.1, train=train)).fit(module, loader())
    assert traces(module) == before


def test_one_callback_serves_one_fit_after_another(tmp_path: Path) -> None:
    guest, found = RouterRebalance(0.5, train="routers"), []
    for _ in range(2):
        module = Foreign(training_model("mixtral"))
        before = traces(module)
        found.append(gradients(tmp_path, module, guest))
        assert traces(module) == before
    assert_same(*found)


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_other_loops_are_left_alone(tmp_path: Path, loop: str) -> None:
    class Other(Foreign):
        def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            assert not any(part._forward_hooks for part in self.inner.modules())

        validation_step = predict_step = test_step

    module = Other(training_model("mixtral"))
    before = traces(module)
    getattr(trainer(tmp_path, RouterRebalance(0.5, train="routers")), loop)(module, loader())
    assert traces(module) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"load_balance": -0.1}, "load_balance -0.1"),
        ({"z_loss": -1.0}, "z_loss -1.0"),
        ({"bias_step": -0.001}, "bias_step -0.001"),
        ({"entropy": -0.1}, "entropy -0.1"),
        ({"load_balance": float("nan")}, "load_balance nan"),
        ({"load_balance": float("inf")}, "load_balance inf"),
        ({"train": "gates"}, "'gates'.*all, routers, routers\\+norms"),
    ],
)
def test_bad_arguments_are_said_in_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^RouterRebalance: .*{words}") as caught:
        RouterRebalance(**arguments)
    assert "\n" not in str(caught.value)


def test_no_model_inside_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RouterRebalance: Foreign holds no Hugging Face model"):
        trainer(tmp_path, RouterRebalance()).fit(Foreign(nn.Linear(2, 2)), loader())
