"""MoECausalLM: any Hugging Face MoE as a LightningModule for fit, validate, test and predict."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import SumMetric
from transformers import AutoConfig, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import load_model, new_model
from lightning_moe.moe.decoding import decode
from lightning_moe.moe.layers import MoELayer, find_moe_layers
from lightning_moe.moe.split_tensors import is_split
from lightning_moe.stats.gradients import GRADIENT_MEMORY, check_gradient_memory

Batch = dict[str, Tensor]


class MoECausalLM(LightningModule):
    """Next-token training and evaluation of a Mixture-of-Experts language model.

    It trains with the next-token loss alone; ``RouterRebalance`` keeps the experts' load even.

    Args:
        path: Folder or hub id of a pretrained model.
        config: Settings of a new model with random weights (``model_type`` and what its config takes), when there
            is no ``path``.
        dtype: Of the weights: ``auto`` keeps what the checkpoint has.
        lr: Highest learning rate.
        min_lr_ratio: What the cosine ends at, as a fraction of ``lr``.
        warmup_steps: Steps of linear warm-up.
        weight_decay: On matrices; norms, biases and embeddings are not decayed.
        betas: Of AdamW.
        gradient_checkpointing: Recompute activations in the backward pass.
        gradient_memory: GiB of summed gradients that a rank holds at once for criteria on gradients. Layers that find
            no room take further passes over the text; the result is the same.
    """

    def __init__(
        self,
        path: str | None = None,
        config: dict[str, Any] | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        lr: float = 1e-4,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_checkpointing: bool = False,
        gradient_memory: float = GRADIENT_MEMORY,
    ) -> None:
        super().__init__()
        check_gradient_memory("--model.gradient_memory", gradient_memory)
        self.path, self.config, self.dtype_name = path, config, dtype
        self.lr, self.min_lr_ratio, self.warmup_steps = lr, min_lr_ratio, warmup_steps
        self.weight_decay, self.betas = weight_decay, betas
        self.gradient_checkpointing, self.gradient_memory = gradient_checkpointing, gradient_memory
        self.model: PreTrainedModel | None = None
        self.moe_layers: list[MoELayer] = []
        self._domain_loss: dict[int, tuple[SumMetric, SumMetric]] = {}

    def attach(self, trainer: Trainer) -> None:
        """Belong to ``trainer`` before its own loop begins; where it splits models, the ranks know each other then."""
        self.trainer = trainer
        begin: Callable[[LightningModule], None] | None = getattr(trainer.strategy, "begin", None)
        if begin is not None:
            begin(self)

    def prepare(self, trainer: Trainer) -> MoECausalLM:
        """Make or load the model before the loop of ``trainer`` does so; all ranks must call it. Returns itself."""
        self.attach(trainer)
        self.configure_model()
        return self

    def configure_model(self) -> None:
        """Make or load the model, once."""
        if self.model is not None:
            return
        if self.path is not None:
            network = self._loaded(self.path)
        elif self.config is not None:
            settings = dict(self.config)
            dtype = torch.float32 if self.dtype_name == "auto" else getattr(torch, self.dtype_name)
            model_type = settings.pop("model_type", None)
            if model_type is None:
                raise InputError("--model.config: no `model_type` in it.")
            config = AutoConfig.for_model(model_type, **settings)
            network = new_model(config, dtype)
        else:
            raise InputError(
                "no model: give --model.path a folder or hub id, or --model.config the settings of a new one."
            )
        self.adopt(network.train())  # loading leaves it in evaluation mode, and Lightning keeps what it finds

    def adopt(self, network: PreTrainedModel) -> MoECausalLM:
        """Hold a model that is there already, in place of making or loading one; returns itself."""
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.model, self.moe_layers = network, find_moe_layers(network)
        return self

    def release(self) -> None:
        """Let go of the weights; ``configure_model`` makes or loads them anew. Never two copies at a time."""
        self.model, self.moe_layers = None, []
        gc.collect()

    def load(self, path: str) -> None:
        """Hold the weights of another checkpoint from now on."""
        self.release()
        self.adopt(self._loaded(path).train())

    def _loaded(self, path: str) -> PreTrainedModel:
        """By the strategy of the Trainer where it splits models over ranks: each loads its part."""
        load: Callable[..., PreTrainedModel]
        load = getattr(getattr(self._trainer, "strategy", None), "load_split", load_model)
        return load(path, dtype=self.dtype_name)

    @property
    def network(self) -> PreTrainedModel:
        """The model; an error in our own order of calls if it is not made yet."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def forward(self, batch: Batch) -> Tensor:
        """Logits, ``(B, S, V)``."""
        logits: Tensor = self.network(
            input_ids=batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False
        ).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss_B, count_B = next_token_loss(self(batch), batch)
        loss = loss_B.sum() / count_B.sum().clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the loss of each domain, in float64, to be divided once at the end."""
        loss_B, count_B = next_token_loss(self(batch), batch)
        domain_B = batch.get("domain", torch.zeros_like(count_B))
        for domain in set(domain_B.tolist()):
            chosen_B = domain_B == domain
            loss, count = self._domain_sums(domain)
            loss.update(loss_B[chosen_B].double().sum())
            count.update(count_B[chosen_B].double().sum())

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Run the decoder alone: what observing experts needs, without the cost of the vocabulary."""
        self.decode(batch)

    def decode(self, batch: Batch) -> Tensor:
        """What the output head is given, ``(B, S, H)``."""
        return decode(self.network, batch["input_ids"], padding_mask(batch))

    def _domain_sums(self, domain: int) -> tuple[SumMetric, SumMetric]:
        if domain not in self._domain_loss:
            self._domain_loss[domain] = _float64_sum(self.device), _float64_sum(self.device)
        return self._domain_loss[domain]

    def on_validation_epoch_end(self) -> None:
        domains = self._domains()
        for index in range(len(domains)):  # the same order on every rank, also for a domain this one never saw
            self._domain_sums(index)
        sums = {
            index: (float(loss.compute()), float(count.compute()))
            for index, (loss, count) in sorted(self._domain_loss.items())
        }
        self._domain_loss.clear()
        prefix = "val" if self.trainer.state.fn == "fit" else "validate" if self.trainer.validating else "test"
        total, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
        for index, (loss, count) in sums.items():
            if count == 0:
                continue  # no window of this domain was sampled
            self.log(f"{prefix}/perplexity/{domains[index]}", perplexity_of(loss, count), rank_zero_only=True)
        self.log(f"{prefix}/loss", total / max(tokens, 1), rank_zero_only=True)
        self.log(f"{prefix}/perplexity", perplexity_of(total, tokens), prog_bar=True, rank_zero_only=True)
        self.log(f"{prefix}/tokens", float(tokens), rank_zero_only=True)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def _domains(self) -> tuple[str, ...]:
        loaders = (
            self.trainer.val_dataloaders
            if self.trainer.state.fn in ("fit", "validate")
            else self.trainer.test_dataloaders
        )
        domains: tuple[str, ...] | None = getattr(getattr(loaders, "dataset", None), "domains", None)
        return domains or tuple(str(index) for index in sorted(self._domain_loss))

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only; linear warm-up, then a cosine down to ``min_lr_ratio``."""
        embeddings = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, False): [], (False, False): []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                # The biases of stacked experts have two dimensions; the name tells.
                matrix = parameter.dim() >= 2 and id(parameter) not in embeddings and not name.endswith("bias")
                # Split and whole tensors apart: optimisers take one kind at a time.
                groups.setdefault((matrix, is_split(parameter)), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": self.weight_decay if matrix else 0.0}
                for (matrix, _), parameters in groups.items()
            ],
            lr=self.lr,
            betas=self.betas,
        )
        trainer = self.trainer

        def factor(step: int) -> float:
            # Asked at step 0, before a resumed fit has its state, it would load the text as if nothing had been read.
            return self.lr_factor(step, int(trainer.estimated_stepping_batches) if step else 1)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int, total: int) -> float:
        """The fraction of ``lr`` used at ``step`` of ``total``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def next_token_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and number of predicted tokens of each row of the batch: two ``(B,)`` tensors.

    A position counts when both it and its target are real tokens.
    """
    real = batch["attention_mask"].bool()
    counted = real[:, 1:] & real[:, :-1]
    target = batch["input_ids"][:, 1:].masked_fill(~counted, -100)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none", ignore_index=-100
    )
    return loss.view_as(target).sum(-1), counted.sum(-1)


def padding_mask(batch: Batch) -> Tensor | None:
    """The attention mask, or None when nothing is padded: attention without a mask is faster.

    A fully blank window has no token to attend to; it is run unmasked, and its rows count nowhere.
    """
    mask = batch["attention_mask"]
    if bool(mask.all()):
        return None
    return torch.where(mask.any(-1, keepdim=True), mask, torch.ones_like(mask))


def _float64_sum(device: torch.device) -> SumMetric:
    metric = SumMetric(nan_strategy="disable")  # by default NaN is left out, and a ruined model looks perfect
    metric.set_dtype(torch.float64)
    metric.to(device)
    return metric


def perplexity_of(loss: float, tokens: float = 1) -> float:
    """Of a loss summed over so many tokens; not a number where there are none."""
    return math.exp(min(loss / tokens, 700.0)) if tokens else float("nan")
