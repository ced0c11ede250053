"""RouterRebalance: keep the experts' load even, or make routers surer, while any model is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.batches import batch_mask
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import MoELayer, find_moe_layers, hugging_face_model, hugging_face_models
from lightning_moe.moe.router_losses import attach_loss, gate_entropy_loss, load_balance_loss, router_z_loss
from lightning_moe.moe.routing import Routing, rewrite_weights
from lightning_moe.moe.split_tensors import local
from lightning_moe.stats.usage import RouterCounts

Trained = Literal["all", "routers", "routers+norms"]
"""Which weights learn."""


def wrong_setting(train: str, **weights: float) -> str | None:
    """What is wrong with settings of ``RouterRebalance``, in a line that begins with the setting's name."""
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            return f"{name} {value}: 0 or more."
    if train not in get_args(Trained):
        return f"train {train!r}: one of {', '.join(get_args(Trained))}."
    return None


class RouterRebalance(Callback):
    """Even out the routers' load while the Hugging Face MoE inside a LightningModule is trained.

    The losses join the backward pass at the routers, whatever the training step does; a step that computes its own
    loss needs no change. They are logged under ``router_rebalance/``. Layers may hold different numbers of experts,
    and may lose some during the fit. Padding is what the batch's ``attention_mask`` says, where it has one of the size
    that the routers see.

    Args:
        load_balance: Weight of the load-balance loss, a mean over layers, 1 when all is even (Switch Transformer).
        z_loss: Weight of the mean squared log-sum-exp of the router logits (ST-MoE), a mean over layers.
        bias_step: With each optimiser step a router with a correction bias (DeepSeek-V3, GLM-4, Ernie) has it raised
            by this much for each expert with less than the mean load and lowered for those with more; DeepSeek-V3
            takes 0.001. Such a layer then has no load-balance loss. 0 leaves the biases alone.
        train: What learns: everything that did; the routers alone; or these and the norms. What learns of a model in
            16 bits is held in float32 during the fit, since small steps vanish in 16; with ``bf16-mixed`` precision.
            A note says so where rounding it at the end loses most of what it learned.
        entropy: Weight of the gate's entropy over its largest, a mean over tokens and layers, which makes routers
            sure of fewer experts (SEER-MoE). It pulls against ``load_balance``: with it give that as 0.
    """

    def __init__(
        self,
        load_balance: float = 0.01,
        z_loss: float = 0.0,
        bias_step: float = 0.0,
        train: Trained = "all",
        entropy: float = 0.0,
    ) -> None:
        wrong = wrong_setting(train, load_balance=load_balance, z_loss=z_loss, bias_step=bias_step, entropy=entropy)
        if wrong is not None:
            raise InputError(f"RouterRebalance: {wrong}")
        self.load_balance, self.z_loss, self.bias_step, self.train = load_balance, z_loss, bias_step, train
        self.entropy = entropy
        self._context = ExitStack()
        self._counts: RouterCounts | None = None
        self._scale = 1.0
        self._training = self._backward = False
        self._forwarded: set[str] = set()
        self._losses: dict[str, list[Tensor]] = {}
        self._frozen: list[str] = []
        self._widened: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze as soon as the model is there: optimisers and DDP look at the weights before any later hook."""
        if stage != "fit" or self.train == "all":
            return
        configure = pl_module.configure_model

        def configure_and_freeze() -> None:
            vars(pl_module).pop("configure_model")
            configure()
            if hugging_face_models(pl_module):
                self._freeze(pl_module)

        vars(pl_module)["configure_model"] = configure_and_freeze

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, "RouterRebalance")
        self._freeze(pl_module)
        self._counts = RouterCounts(model)
        self._context.enter_context(rewrite_weights(self._counts.layers, self._watch))

    def _freeze(self, pl_module: LightningModule) -> None:
        if self.train == "all" or self._frozen:
            return
        model = hugging_face_model(pl_module, "RouterRebalance")
        learns = {id(parameter) for parameter in trained_parameters(model, self.train)}
        self._frozen = [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in learns]
        for name in self._frozen:
            pl_module.get_parameter(name).requires_grad_(False)
        narrow = {name: p for name, p in pl_module.named_parameters() if p.requires_grad and p.element_size() < 4}
        if narrow and not pl_module.trainer.precision.endswith("-mixed"):
            raise InputError(
                f"RouterRebalance: train {self.train!r}: the weights are in {next(iter(narrow.values())).dtype}, where "
                "small steps vanish; give the Trainer precision bf16-mixed, and what learns is held in float32."
            )
        self._widened = {name: parameter.data for name, parameter in narrow.items()}
        for parameter in narrow.values():
            parameter.data = parameter.data.float()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._counts is not None
        self._backward = False
        self._counts.next_batch(batch_mask(batch))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # As the loss of the step is: divided by the batches of a step, multiplied by the scaler of 16-bit training.
        self._scale = (scaler.get_scale() if scaler is not None else 1.0) / trainer.accumulate_grad_batches
        self._losses = {}
        self._training, self._forwarded = True, set()

    def _watch(self, layer: MoELayer, routing: Routing) -> Tensor | None:
        assert self._counts is not None
        if not self._training or not torch.is_grad_enabled():
            return None
        # A layer that recomputes its activations routes the same tokens again; reentrant, only then with a graph.
        again = self._backward and layer.name in self._forwarded
        if not self._backward:
            self._forwarded.add(layer.name)
        biases = self.bias_step and layer.correction_biases
        if biases and not again:
            self._counts.add(layer, routing)
        if not routing.weights_TK.requires_grad:
            return None
        mask_T, weights_TK = self._counts.mask_of(routing), routing.weights_TK
        for name, weight, loss in (
            ("load_balance", 0.0 if biases else self.load_balance, load_balance_loss),
            ("z_loss", self.z_loss, router_z_loss),
            ("entropy", self.entropy, gate_entropy_loss),
        ):
            if weight:
                value = loss(routing, mask_T)
                if not again:
                    self._losses.setdefault(name, []).append(value.detach())
                weights_TK = attach_loss(weights_TK, value, self._scale * weight / len(self._counts.layers))
        return None if weights_TK is routing.weights_TK else weights_TK

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._counts is not None
        self._backward = True

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._counts is not None
        self._backward, self._forwarded = False, set()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert self._counts is not None
        if not self.bias_step or not any(layer.correction_biases for layer in self._counts.layers):
            return
        counts = self._counts.take(lambda count_E: trainer.strategy.reduce(count_E, reduce_op="sum"))
        with torch.no_grad():
            for layer in self._counts.layers:
                for bias in layer.correction_biases:
                    count_E = torch.tensor(counts[layer.name], device=bias.device)
                    left = slice(None) if layer.kept is None else layer.kept
                    bias[..., left] += self.bias_step * torch.sign(count_E.mean() - count_E).to(bias)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._training = False
        for name, losses in self._losses.items():
            pl_module.log(f"router_rebalance/{name}", torch.stack(losses).mean())
        self._losses = {}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moved = kept = 0
        for name, whole in self._widened.items():
            # Wherever they are: some strategies have taken the model off its device by now.
            before, after = local(whole).cpu(), local(pl_module.get_parameter(name).data).cpu()
            if before.shape == after.shape:  # else experts have gone
                moved += int(torch.count_nonzero(after != before))
                kept += int(torch.count_nonzero(after.to(before.dtype) != before))
        if kept < moved / 2 and trainer.is_global_zero:
            print(
                f"note: RouterRebalance: of {moved:,} weights that learned here, {moved - kept:,} are as they were "
                "once they are in 16 bits again; give a higher learning rate, or load the model in float32."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._context.close()
        self._training = False
        vars(pl_module).pop("configure_model", None)
        for name in self._frozen:  # by name: pruning puts other parameters in their place
            pl_module.get_parameter(name).requires_grad_(True)
        for name, before in self._widened.items():
            parameter = pl_module.get_parameter(name)
            parameter.data = parameter.data.to(before.dtype)
        self._frozen, self._widened, self._counts = [], {}, None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def trained_parameters(model: PreTrainedModel, train: Trained) -> Iterator[nn.Parameter]:
    """The parameters that learn. A norm is a module that holds vectors and nothing else, its ``weight`` among them."""
    if train == "all":
        yield from model.parameters()
        return
    for layer in find_moe_layers(model):
        biases = {id(bias) for bias in layer.correction_biases}
        yield from (parameter for parameter in layer.router.parameters() if id(parameter) not in biases)
    if train == "routers+norms":
        for module in model.modules():
            own = dict(module.named_parameters())
            if "weight" in own and own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values()):
                yield from own.values()
