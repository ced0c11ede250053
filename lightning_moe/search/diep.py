"""DiEPSearch: the LightningModule that learns alpha and beta on a frozen model."""

# L layers, E experts of one layer, B windows, S positions

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import Batch, MoECausalLM, next_token_loss
from lightning_moe.moe.experts import expert_hooks
from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.ranks import average_over_ranks
from lightning_moe.moe.routing import Routing, record_routing
from lightning_moe.pruning.budget import make_plan
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.search.importance import ImportanceLogits, beta_profile, layer_gates, parse_ratio
from lightning_moe.search.objective import Target, head_inputs, kl_divergence, mean_gate, reconstruction
from lightning_moe.search.relaxation import Relaxation, relaxed

Score = Literal["gate", "raw", "frequency"]
"""``E softmax(alpha) beta``; ``alpha beta`` (DiEP, Eq. 10); ``beta`` times how often the router picks the expert,
1 for an even share."""

Views = dict[Target, Tensor]
"""What a forward gives, by where it is looked at."""


class DiEPSearch(LightningModule):
    """Differentiable expert pruning (DiEP, arXiv 2509.16105, section 3): trains alpha ``(L, E)`` and beta ``(L,)``.

    The model's own weights stay as they are, bit by bit; they are also the teacher, with the gates off. Each update
    moves either the alphas or the betas, in turn (Algorithm 1: each sees what the other has become).

    The loss is ``task + weight * reconstruction + pressure * mean gate``. Where the student still equals the teacher
    the reconstruction is flat and the task loss mostly noise: without pressure nothing says which gates the model
    could do without. The pressure pushes all gates down alike; the other terms hold up those that matter.

    Args:
        model: The model to search in.
        relaxation: How the gates enter the forward pass, see ``Relaxation``.
        task: Next-token cross entropy, the KL divergence from the teacher's distribution, or nothing.
        target: What is reconstructed: the output head's input or its output.
        relative: Reconstruction as squared distance over the teacher's square, or as a plain norm (as printed).
        weight: Of the reconstruction (lambda).
        pressure: Weight of the mean gate.
        lr: Learning rate of both.
        min_lr_ratio: What a cosine over the whole search ends at, as a fraction of ``lr``; 1 keeps it constant.
        optimizer: Of both.
        schedule: ``"a:b"``: a updates of alpha, then b of beta.
        learn_alpha: False keeps all experts of a layer alike.
        betas: ``learned``; ``fixed`` at 1; or a fixed profile, see ``beta_profile``.
        score: What alpha and beta say of an expert.
        updates: Length of the search; the `max_steps` of its Trainer.
        accumulate: Batches per update.
        seed: Of a random profile.
        ratio: Fraction of the experts that ``kept_experts`` leaves out; it changes nothing of what is learned.
        floor: Fewest experts it leaves in a layer; None is what the router needs.
    """

    def __init__(
        self,
        model: MoECausalLM,
        relaxation: Relaxation = "routed",
        task: Literal["ce", "kl", "none"] = "ce",
        target: Target = "hidden",
        relative: bool = True,
        weight: float = 3.0,
        pressure: float = 1.0,
        lr: float = 0.05,
        min_lr_ratio: float = 1.0,
        optimizer: Literal["adam", "sgd"] = "adam",
        schedule: str = "3:1",
        learn_alpha: bool = True,
        betas: str = "learned",
        score: Score = "gate",
        updates: int = 60,
        accumulate: int = 1,
        seed: int = 0,
        ratio: float = 0.5,
        floor: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold alpha and beta, not the model
        self.model = model
        self.relaxation, self.task, self.target, self.relative = relaxation, task, target, relative
        self.weight, self.pressure = weight, pressure
        self.lr, self.min_lr_ratio, self.optimizer_name = lr, min_lr_ratio, optimizer
        self.learn_alpha, self.betas, self.score = learn_alpha, betas, score
        self.updates, self.accumulate, self.seed = updates, accumulate, seed
        self.ratio, self.floor = ratio, floor
        if not learn_alpha and betas != "learned":
            raise InputError("the search has nothing to learn: alpha is fixed, and so is beta.")
        if task == "none" and not weight and not pressure:
            raise InputError("the search has nothing to minimise: task is none, weight and pressure are 0.")
        for name in ("updates", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: at least 1.")
        if not lr > 0:
            raise InputError(f"lr {lr}: above 0.")
        if not 0 <= min_lr_ratio <= 1:
            raise InputError(f"min_lr_ratio {min_lr_ratio}: between 0 and 1.")
        if betas not in ("learned", "fixed", "random"):
            parse_ratio(betas, "betas")
        alpha_turns, beta_turns = parse_ratio(schedule, "schedule")
        self._turns = [True] * (alpha_turns * learn_alpha) + [False] * (beta_turns * (betas == "learned"))
        self.done = 0
        """Updates made so far."""
        self._batches = 0
        self._importance: ImportanceLogits | None = None
        self._routed: dict[str, Tensor] = {}
        self._trained: list[nn.Parameter] = []

    @property
    def importance(self) -> ImportanceLogits:
        assert self._importance is not None, "configure_model has not run"
        return self._importance

    @property
    def moe_layers(self) -> list[MoELayer]:
        return self.model.moe_layers

    @override
    def configure_model(self) -> None:
        self.model.configure_model()
        if self._importance is not None:
            return
        counts = [layer.shape.num_experts for layer in self.moe_layers]
        self._importance = ImportanceLogits(counts)
        if not self.learn_alpha:
            self._importance.alphas.requires_grad_(False)
        if self.betas != "learned":
            self._importance.beta_L.requires_grad_(False)
            if self.betas != "fixed":
                with torch.no_grad():
                    self._importance.beta_L.copy_(beta_profile(self.betas, len(counts), self.seed))
        self._routed = {
            layer.name: torch.zeros(count, dtype=torch.float64)
            for layer, count in zip(self.moe_layers, counts, strict=True)
        }
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)

    @override
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.optimizer_name]
        groups = [list(self.importance.alphas)] * self.learn_alpha + [[self.importance.beta_L]] * (
            self.betas == "learned"
        )
        return [kind(group, lr=self.lr) for group in groups]

    @override
    def on_fit_start(self) -> None:
        """No dropout, no router noise; but layers recompute their activations only when in training mode."""
        self.model.eval()
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    @override
    def on_fit_end(self) -> None:
        self.model.train()
        for parameter in self._trained:
            parameter.requires_grad_(True)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        teacher = self._teacher(batch)
        with relaxed(self.model.network, self.moe_layers, self.importance, self.relaxation):
            student = self._run(batch, with_logits=True)
            losses = self._losses(student, teacher, batch)
            loss = losses["task"] + self.weight * losses["reconstruction"] + self.pressure * losses["mean_gate"]
            self.manual_backward(loss / self.accumulate)
        self.log_dict({f"search/{name}": value.detach() for name, value in losses.items()})
        self.log("search/loss", loss.detach(), prog_bar=True)
        self._batches += 1
        if self._batches % self.accumulate == 0:
            self._update()
            # Not the loss, which is each rank's own: all ranks must stop, or none, lest one waits for the others.
            if not all(bool(parameter.isfinite().all()) for parameter in self.importance.parameters()):
                raise InputError(
                    f"the search's loss is {float(loss)} after {self.done} updates, alpha and beta no longer finite; "
                    f"lower its lr {self.lr}."
                )

    def _run(self, batch: Batch, with_logits: bool) -> Views:
        """One forward; without logits the output head, a large part of a small model, is spared."""
        if not with_logits:
            return {"hidden": self.model.decode(batch)}
        with head_inputs(self.model.network) as hidden:
            logits = self.model(batch)
        return {"hidden": hidden[0], "logits": logits}

    def _teacher(self, batch: Batch) -> Views:
        """What the full model gives, as far as it is needed."""
        wants_logits = self.task == "kl" or (self.weight != 0 and self.target == "logits")
        if not (wants_logits or self.weight or self.score == "frequency"):
            return {}
        with torch.no_grad(), ExitStack() as contexts:
            # Through the same experts function as the student: in bfloat16 two kernels round apart, and the distance
            # would start as noise.
            contexts.enter_context(expert_hooks(self.model.network, self.moe_layers, {}))
            if self.score == "frequency":
                contexts.enter_context(record_routing(self.moe_layers, self._count(batch["attention_mask"].flatten())))
            return self._run(batch, wants_logits)

    def _losses(self, student: Views, teacher: Views, batch: Batch) -> dict[str, Tensor]:
        real_BS = batch["attention_mask"].bool()
        task = distance = student["logits"].new_zeros((), dtype=torch.float32)
        if self.task == "ce":
            loss_B, count_B = next_token_loss(student["logits"], batch)
            task = loss_B.sum() / count_B.sum().clamp(min=1)
        elif self.task == "kl":
            task = kl_divergence(student["logits"], teacher["logits"], real_BS)
        if self.weight:
            distance = reconstruction(student[self.target], teacher[self.target], real_BS, self.relative)
        return {"task": task, "reconstruction": distance, "mean_gate": mean_gate(self.importance.gates())}

    def _count(self, real_T: Tensor) -> Any:
        def count(layer: MoELayer, routing: Routing) -> None:
            ids = routing.expert_ids_TK[real_T.bool()].flatten()
            count_E = torch.bincount(ids, minlength=layer.num_experts)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(count_E)
            self._routed[layer.name] += (count_E if layer.kept is None else count_E[layer.kept]).double().cpu()

        return count

    def _update(self) -> None:
        """Move the alphas or the betas, whose turn it is."""
        optimizers = self.optimizers()
        both = optimizers if isinstance(optimizers, list) else [optimizers]
        turns_alpha = self._turns[self.done % len(self._turns)]
        optimizer = both[0] if turns_alpha else both[-1]
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.lr_factor(self.done)
            # Some strategies have averaged already, which changes nothing; within somebody's fit nobody has.
            average_over_ranks(parameter.grad for parameter in group["params"] if parameter.grad is not None)
        optimizer.step()
        for each in both:
            each.zero_grad()
        self.done += 1

    def lr_factor(self, update: int) -> float:
        """The fraction of ``lr`` used at ``update``."""
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * update / self.updates))

    def scores(self) -> dict[str, Tensor]:
        """The score of every expert by layer name, ``(E,)`` float64, higher means keep."""
        names = [layer.name for layer in self.moe_layers]
        with torch.no_grad():
            alphas = [alpha_E.double() for alpha_E in self.importance.alphas]
            betas = self.importance.beta_L.double().unbind()
            if self.score == "raw":
                values = [alpha_E * beta for alpha_E, beta in zip(alphas, betas, strict=True)]
            elif self.score == "frequency":
                counts = [self._routed[name] for name in names]
                values = [
                    beta.cpu() * count_E * (count_E.shape[0] / count_E.sum().clamp(min=1))
                    for beta, count_E in zip(betas, counts, strict=True)
                ]
            else:
                values = [layer_gates(alpha_E, beta) for alpha_E, beta in zip(alphas, betas, strict=True)]
        return {name: value_E.cpu() for name, value_E in zip(names, values, strict=True)}

    def kept_experts(self) -> dict[str, list[int]]:
        """The experts to keep as things stand, by layer name: the highest scores over all layers (Eq. 11)."""
        shapes = [layer.shape for layer in self.moe_layers]
        scores = ExpertScores("", "", "diep", shapes, self.scores())
        return make_plan(scores, self.ratio, "global", self.floor).keep

    def importance_logits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Alpha ``(E,)`` and beta of each layer, by name."""
        layers = zip(self.moe_layers, self.importance.alphas, self.importance.beta_L.unbind(), strict=True)
        return {layer.name: (alpha_E.detach(), beta.detach()) for layer, alpha_E, beta in layers}

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # it has overloads
        """Alpha and beta alone: the model is where it came from, and as it was."""
        return self.importance.state_dict(prefix="_importance.")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["diep_search"] = {"done": self.done, "batches": self._batches, "routed": self._routed}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["diep_search"]
        self.done, self._batches, self._routed = state["done"], state["batches"], state["routed"]
