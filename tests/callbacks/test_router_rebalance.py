"""RouterRebalance as a guest: its losses train anybody's model as if added by hand, and it goes without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from lightning_moe.callbacks.expert_usage_monitor import ExpertUsageMonitor
from lightning_moe.callbacks.router_rebalance import RouterRebalance, trained_parameters
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.router_losses import gate_entropy_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, VOCAB, tiny_model
from tests.helpers.plans import non_uniform_plan

LENGTH = 12
WITH_BIASES = ["deepseek_v3", "ernie4_5_moe"]


class Foreign(LightningModule):
    """Somebody's module, which knows nothing of us: the model lies deep inside, under its own names."""

    def __init__(self, model: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.head = nn.Linear(VOCAB, 3)
        nn.init.constant_(self.head.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([model])})
        self.lr = lr

    @property
    def inner(self) -> Any:
        return self.wrapped["inner"][0]  # type: ignore[index]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        logits = self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss + self.head(logits).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ByHand(Foreign):
    """The same step with the losses added where anybody would add them."""

    def __init__(self, model: PreTrainedModel, load_balance: float, z_loss: float = 0.0, entropy: float = 0.0) -> None:
        super().__init__(model)
        self.weights = {load_balance_loss: load_balance, router_z_loss: z_loss, gate_entropy_loss: entropy}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        routings: list[Routing] = []
        with record_routing(find_moe_layers(self.inner), lambda _, routing: routings.append(routing)):
            loss = super().training_step(batch, batch_idx)
        mask = batch.get("attention_mask")
        mask_T = None if mask is None else mask.flatten()
        for one, weight in self.weights.items():
            loss = loss + weight * sum(one(routing, mask_T) for routing in routings) / len(routings)
        return loss


class Windows(Dataset[dict[str, Tensor]]):
    """8 sequences; the odd ones end in padding, unless there is no mask at all."""

    def __init__(self, masked: bool = True) -> None:
        self.ids = torch.randint(3, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(0))
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.ones(LENGTH, dtype=torch.long)
        if index % 2:
            mask[-5:] = 0
        item = {"input_ids": self.ids[index]}
        return item | {"attention_mask": mask} if self.masked else item


def loader(masked: bool = True) -> DataLoader[dict[str, Tensor]]:
    """4 batches of 2."""
    return DataLoader(Windows(masked), batch_size=2)


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "devices": 1, "num_sanity_val_steps": 0} | kwargs
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )


def training_model(family: str, pruned: bool = False, recompute: bool = False) -> PreTrainedModel:
    model = tiny_model(family)
    if pruned:
        keep_experts(model, non_uniform_plan(model))
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class Gradients(Callback):
    """Those of every optimiser step, as the optimiser gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in metrics if name.startswith("router_rebalance/")})


def gradients(folder: Path, module: Foreign, *callbacks: Callback, masked: bool = True, **kwargs: Any) -> Gradients:
    found = Gradients()
    trainer(folder, found, *callbacks, **kwargs).fit(module, loader(masked))
    return found


def assert_same(found: Gradients, expected: Gradients, rtol: float = 1e-4) -> None:
    assert len(found.steps) == len(expected.steps) > 0
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=rtol, atol=1e-6, msg=name)


def assert_differ(found: Gradients, expected: Gradients, model: PreTrainedModel) -> None:
    """In the first step, at every router."""
    for layer in find_moe_layers(model):
        name = next(name for name in found.steps[0] if name.endswith(f"{layer.name}.{_router_weight(layer)}"))
        assert not torch.allclose(found.steps[0][name], expected.steps[0][name], rtol=1e-2, atol=0), name


def _router_weight(layer: Any) -> str:
    own = next(name for name, module in layer.parts.block.named_modules() if module is layer.router)
    inner = next(name for name, parameter in layer.router.named_parameters() if parameter is layer.router_weight)
    return f"{own}.{inner}"


def traces(module: nn.Module) -> dict[str, Any]:
    """Everything a guest could have left behind."""
    return {
        "hooks": {
            name: (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for name, part in module.named_modules()
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        },
        "attributes": {name: sorted(part.__dict__) for name, part in module.wrapped.named_modules()},  # type: ignore
        "learns": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
    }


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
    run = trainer(tmp_path, found, RouterRebalance(0.5), val_check_interval=1)
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


# ----------------------------------------------------------------------------------------------- effect


def slow_cv(model: PreTrainedModel) -> float:
    """Standard deviation over mean of each layer's load by the text, averaged over layers."""
    counts: dict[str, list[int]] = {}

    def record(layer: Any, routing: Routing) -> None:
        count_E = counts.setdefault(layer.name, [0] * layer.num_experts)
        for expert in routing.expert_ids_TK.flatten().tolist():
            count_E[expert] += 1

    with record_routing(find_moe_layers(model), record), torch.no_grad():
        for batch in loader(masked=False):
            model(batch["input_ids"])
    found = []
    for count_E in counts.values():
        mean = sum(count_E) / len(count_E)
        found.append((sum((count - mean) ** 2 for count in count_E) / len(count_E)) ** 0.5 / mean)
    return sum(found) / len(found)


def skewed_model(family: str) -> PreTrainedModel:
    """Two experts of every layer are liked by all tokens."""
    model = tiny_model(family)
    for layer in find_moe_layers(model):
        inputs: list[Tensor] = []
        hook = layer.router.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(next(iter(loader(masked=False)))["input_ids"])
        hook.remove()
        mean_H = inputs[0].flatten(0, -2).mean(0)
        with torch.no_grad():
            layer.router_weight[:2] += 2 * mean_H / mean_H.norm()
    return model


@pytest.mark.parametrize(("train", "lr"), [("all", 0.05), ("routers", 0.3)])
def test_a_skewed_router_is_evened_out(tmp_path: Path, train: Any, lr: float) -> None:
    found = []
    for weight in (0.0, 1.0):
        model = skewed_model("mixtral").train()
        before = slow_cv(model)
        guest = RouterRebalance(weight, train=train)
        trainer(tmp_path, guest, max_epochs=10).fit(Foreign(model, lr), loader(masked=False))
        found.append(slow_cv(model))
    assert before > 0.6
    assert found[1] < 0.6 * before
    assert found[1] < 0.6 * found[0]


def mean_entropy(model: PreTrainedModel) -> float:
    """Of the gates, from 0 to 1, over layers and all tokens."""
    routings: list[Routing] = []
    with torch.no_grad(), record_routing(find_moe_layers(model), lambda _, routing: routings.append(routing)):
        for batch in loader(masked=False):
            model(batch["input_ids"])
    return sum(float(gate_entropy_loss(routing)) for routing in routings) / len(routings)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_routers_become_sure_of_fewer_experts(tmp_path: Path, family: str) -> None:
    """Far more than the same training does without; also of a model that was cut."""
    found = []
    for weight in (0.0, 1.0):
        model = training_model(family, pruned=True)
        before = mean_entropy(model)
        guest = RouterRebalance(0.0, entropy=weight)
        trainer(tmp_path, guest, max_epochs=6).fit(Foreign(model), loader(masked=False))
        found.append(mean_entropy(model))
    assert before > 0.3
    assert found[1] < 0.8 * min(before, found[0])


def test_biases_even_out_a_skewed_router(tmp_path: Path) -> None:
    model = skewed_model("deepseek_v3").train()
    before = slow_cv(model)
    trainer(tmp_path, RouterRebalance(bias_step=0.05), max_epochs=8).fit(Foreign(model, lr=0.0), loader(masked=False))
    assert slow_cv(model) < 0.8 * before


# ---------------------------------------------------------------------------------------------- biases


class CountsBiases(Foreign):
    """Counts by hand in the first forward of each step, recomputing left out, and keeps the biases after each step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.counts: list[list[list[int]]] = []
        self.biases: list[list[Tensor]] = []

    def on_train_start(self) -> None:
        self.biases.append([bias.clone() for layer in find_moe_layers(self.inner) for bias in layer.correction_biases])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        routings: list[Routing] = []
        layers = find_moe_layers(self.inner)
        with record_routing(layers, lambda _, routing: routings.append(routing)):
            loss = super().training_step(batch, batch_idx)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        counted = []
        for layer, routing in zip(layers, routings, strict=True):
            count_E = [0] * layer.num_experts
            for real, ids in zip(mask, routing.expert_ids_TK.tolist(), strict=True):
                for expert in ids:
                    count_E[expert] += real
            counted.append(count_E)
        self.counts.append(counted)
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_train_start()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
@pytest.mark.parametrize("family", WITH_BIASES)
def test_biases_move_by_one_step_towards_even_load(
    tmp_path: Path, family: str, masked: bool, accumulate: int, recompute: bool
) -> None:
    """b_i += step * sign(mean count - count_i), once per optimiser step, by all its batches, each token once."""
    step, module = 0.01, CountsBiases(training_model(family, pruned=True, recompute=recompute))
    shapes = {tuple(bias.shape) for layer in find_moe_layers(module.inner) for bias in layer.correction_biases}
    assert shapes == ({(4,), (6,)} if family == "deepseek_v3" else {(1, 4), (1, 6)})
    guest = RouterRebalance(bias_step=step)
    trainer(tmp_path, guest, accumulate_grad_batches=accumulate).fit(module, loader(masked))
    assert len(module.counts) == 4
    assert len(module.biases) == 5
    uneven = False
    for number in range(4):
        stepped = (number + 1) % accumulate == 0
        window = module.counts[number + 1 - accumulate : number + 1]
        for turn, (before, after) in enumerate(zip(module.biases[number], module.biases[number + 1], strict=True)):
            if not stepped:
                assert torch.equal(after, before)
                continue
            count_E = [sum(batch[turn][expert] for batch in window) for expert in range(before.numel())]
            mean = sum(count_E) / len(count_E)
            signs = [(mean > count) - (mean < count) for count in count_E]
            uneven |= any(signs)
            expected = before + step * torch.tensor(signs, dtype=torch.float32).view_as(before)
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-7)
    assert uneven


def test_reentrant_recomputing_counts_for_biases_too(tmp_path: Path) -> None:
    found = []
    for reentrant in (None, True):
        model = training_model("deepseek_v3")
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        trainer(tmp_path, RouterRebalance(bias_step=0.01), max_steps=1).fit(Foreign(model), loader())
        found.append([bias.clone() for layer in find_moe_layers(model) for bias in layer.correction_biases])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("family", WITH_BIASES)
def test_layers_with_biases_have_no_load_balance_loss(tmp_path: Path, family: str) -> None:
    """With ``bias_step``; the gradients of the first step are those without a guest, and nothing is logged."""
    model = training_model(family)
    guest = gradients(tmp_path, Foreign(model), RouterRebalance(0.5, bias_step=0.01), max_steps=1)
    assert_same(guest, gradients(tmp_path, Foreign(training_model(family)), max_steps=1))
    assert guest.logged == [{}]
    other = gradients(tmp_path, Foreign(training_model(family)), RouterRebalance(0.5), max_steps=1)
    assert_differ(other, guest, model)
    z = gradients(tmp_path, Foreign(training_model(family)), RouterRebalance(0.5, z_loss=0.2, bias_step=0.01))
    hand = gradients(tmp_path, ByHand(training_model(family), 0.0, 0.2), max_steps=1)
    z.steps = z.steps[:1]
    assert_same(z, hand)


def test_without_biases_the_step_changes_nothing(tmp_path: Path) -> None:
    guest = gradients(tmp_path, Foreign(training_model("mixtral")), RouterRebalance(0.5, bias_step=0.01))
    assert_same(guest, gradients(tmp_path, ByHand(training_model("mixtral"), 0.5)))


def test_validation_moves_no_bias(tmp_path: Path) -> None:
    found = []
    for kwargs, loaders in (({}, ()), ({"val_check_interval": 1}, (loader(masked=False),))):
        model = training_model("deepseek_v3")
        trainer(tmp_path, RouterRebalance(bias_step=0.01), **kwargs).fit(Foreign(model), loader(), *loaders)
        found.append([bias.clone() for layer in find_moe_layers(model) for bias in layer.correction_biases])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# --------------------------------------------------------------------------------------- what is trained


class Decayed(Foreign):
    """AdamW, whose decay moves every weight it is given a gradient for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def should_learn(module: Foreign, train: str) -> set[str]:
    """By name: everything of a router but the correction bias, and vectors called norms."""
    routers = [f"wrapped.inner.0.{layer.name}." for layer in find_moe_layers(module.inner)]
    names = set()
    for name, parameter in module.named_parameters():
        prefix = next((prefix for prefix in routers if name.startswith(prefix)), None)
        part = "" if prefix is None else name.removeprefix(prefix)
        if part.startswith(("gate.", "router.", "wg.")) and "correction" not in name:
            names.add(name)
        if train == "routers+norms" and "norm" in name and parameter.dim() == 1:
            names.add(name)
    return names


@pytest.mark.parametrize("train", ["routers", "routers+norms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_stays_bit_by_bit(tmp_path: Path, family: str, train: Any) -> None:
    module = Decayed(training_model(family))
    module.inner.get_input_embeddings().weight.requires_grad_(False)  # somebody froze this before
    learns = should_learn(module, train)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    traces_before = traces(module)
    trainer(tmp_path, RouterRebalance(0.5, train=train), max_steps=2).fit(module, loader())
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert learns and changed == learns
    assert traces(module) == traces_before


def test_all_learns_by_default(tmp_path: Path) -> None:
    module = Decayed(training_model("mixtral"))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer(tmp_path, RouterRebalance(0.5), max_steps=1).fit(module, loader())
    assert not [name for name, p in module.named_parameters() if torch.equal(p, before[name])]


def test_trained_parameters_are_given_once() -> None:
    """An optimiser refuses a weight twice."""
    for family in FAMILIES:
        model = tiny_model(family)
        for train in ("all", "routers", "routers+norms"):
            found = [id(parameter) for parameter in trained_parameters(model, train)]
            assert len(found) == len(set(found)), (family, train)


class Late(Foreign):
    """Makes its model in ``configure_model``, as sharded training asks for."""

    def __init__(self, family: str = "mixtral") -> None:
        super().__init__(nn.Identity())
        self.family = family

    def configure_model(self) -> None:
        if isinstance(self.inner, nn.Identity):
            self.wrapped["inner"][0] = training_model(self.family)  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.given = len(learning)
        return torch.optim.AdamW(learning, lr=0.01)


def test_a_model_that_is_made_late_is_frozen_before_the_optimiser_sees_it(tmp_path: Path) -> None:
    """So that states are made for the routers alone, and DDP waits for no gradient that never comes."""
    module = Late()
    trainer(tmp_path, RouterRebalance(0.5, train="routers"), max_steps=2).fit(module, loader())
    assert module.given == len(find_moe_layers(module.inner))


# --------------------------------------------------------------------------------------- of 16-bit weights


class Slow(Foreign):
    """AdamW at a rate that bfloat16 does not feel: the next number above 1 is 1.0078. May fail after two steps."""

    fails = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.fails and batch_idx == 2:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, weight_decay=0.1)


class Weights(Callback):
    """As they are at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def slow_model(family: str) -> Slow:
    """The model in bfloat16, somebody's own head in float32."""
    return Slow(training_model(family).to(torch.bfloat16))


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("train", ["routers", "routers+norms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_learns_of_a_16_bit_model_is_held_in_float32(tmp_path: Path, family: str, train: Any, fails: bool) -> None:
    """It moves with every step, and is rounded once, at the end; nothing else moves or changes its type."""
    module, weights = slow_model(family), Weights()
    module.fails = fails
    learns, traces_before = should_learn(module, train), traces(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = trainer(tmp_path, RouterRebalance(0.5, train=train), weights, precision="bf16-mixed", limit_train_batches=3)
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        run.fit(module, loader())
    assert learns and len(weights.seen) == (2 if fails else 3)
    last = {name: before[name].float() for name in learns}
    for seen in weights.seen:
        for name, parameter in seen.items():
            assert parameter.dtype == (torch.float32 if name in learns else before[name].dtype), name
            if name in learns:
                assert not torch.equal(parameter, last[name]), name
        last = {name: seen[name] for name in learns}
    for name, tensor in module.state_dict().items():
        expected = last[name].to(before[name].dtype) if name in learns else before[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert traces(module) == traces_before


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("train", ["routers", "routers+norms"])
def test_a_16_bit_model_without_mixed_precision_is_refused(tmp_path: Path, train: Any, precision: Any) -> None:
    module, weights = slow_model("mixtral"), Weights()
    before, traces_before = {n: t.clone() for n, t in module.inner.state_dict().items()}, traces(module)
    with pytest.raises(InputError, match=r"^RouterRebalance: train .*bfloat16.*bf16-mixed") as caught:
        trainer(tmp_path, RouterRebalance(train=train), weights, precision=precision).fit(module, loader())
    assert "\n" not in str(caught.value) and not weights.seen
    for name, tensor in module.inner.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert traces(module) == traces_before


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


# ----------------------------------------------------------------------------------------------- ranks


class WritesRank(Callback):
    """What this rank holds and has counted when training ends."""

    def __init__(self, folder: Path, monitor: ExpertUsageMonitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        held = {"weights": pl_module.state_dict(), "counts": pl_module.counts, "biases": pl_module.biases}
        torch.save(held | {"looks": self.monitor.looks}, self.folder / f"rank-{trainer.global_rank}.pt")


def on_two_ranks(folder: Path, module: LightningModule, *callbacks: Callback) -> None:
    trainer(folder, *callbacks, devices=2, strategy="ddp_spawn").fit(module, loader())


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path, _one_thread: None) -> None:
    """The same weights and biases on both; biases by the counts of both, which the monitor beside it sees, too."""
    monitor = ExpertUsageMonitor(tmp_path / "usage", every_n_steps=1)
    module = CountsBiases(training_model("deepseek_v3"))
    on_two_ranks(
        tmp_path,
        module,
        RouterRebalance(0.5, z_loss=0.2, bias_step=0.01, entropy=0.2),
        monitor,
        WritesRank(tmp_path, monitor),
    )
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, two["weights"][name]), name
    assert one["counts"] != two["counts"]
    assert one["looks"] == two["looks"]
    assert len(one["looks"]) == len(one["counts"]) == 2
    for number, (_, _, seen) in enumerate(one["looks"]):
        for turn, count_E in enumerate(seen.values()):
            both_E = torch.tensor(one["counts"][number][turn]) + torch.tensor(two["counts"][number][turn])
            assert count_E == both_E.tolist()
            signs_E = torch.sign(both_E.double().mean() - both_E)
            moved_E = one["biases"][number + 1][turn] - one["biases"][number][turn]
            torch.testing.assert_close(moved_E, (0.01 * signs_E).float(), rtol=0, atol=1e-7)
    assert sorted(file.name for file in (tmp_path / "usage").iterdir()) == ["expert_usage.csv", "expert_usage.png"]


@pytest.mark.slow
def test_two_ranks_train_routers_of_a_model_that_is_made_late(tmp_path: Path, _one_thread: None) -> None:
    """DDP must not wait for gradients of what is frozen."""
    on_two_ranks(tmp_path, Late(), RouterRebalance(0.5, train="routers"))
