"""Scores of a model as it lies in memory, by any criterion or search, with no Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.criteria import Direction, get_criterion
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM, next_token_loss, padding_mask
from lightning_moe.moe.decoding import decode
from lightning_moe.moe.layers import computing_device, find_moe_layers
from lightning_moe.moe.ranks import num_ranks, rank
from lightning_moe.moe.routing import unwatched
from lightning_moe.pruning.scores import ExpertScores, score_experts
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.search.presets import preset, preset_of
from lightning_moe.stats.gradients import GRADIENT_MEMORY, GradientSums, layer_chunks, with_gradients
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.store import ModelStats


def check_method(method: str) -> None:
    """Raise ``InputError`` for a method that is neither a criterion nor a search."""
    name = preset_of(method)
    if name is None:
        get_criterion(method)
    else:
        preset(name)


def score_in_memory(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    method: str,
    direction: Direction | None = None,
    seed: int = 0,
    gradient_memory: float = GRADIENT_MEMORY,
) -> ExpertScores:
    """Score the experts of ``model``; it is left as it was, in the mode it was in.

    ``batches`` hold ``input_ids`` and, where something is padded, ``attention_mask``; every rank is given the same and
    computes its share of them. A criterion reads them once, one on gradients once more for each chunk of layers that
    ``gradient_memory`` has room for; a search again and again until its updates are made, each with a batch of every
    rank.
    """
    name = preset_of(method)
    if name is not None:
        module = _search(model, batches, preset(name), seed)
        shapes = [layer.shape for layer in module.moe_layers]
        return ExpertScores("", "", method, shapes, module.scores(), True, {"seed": seed})
    observation = Observation(model).to(computing_device(model))
    with evaluating(model), torch.no_grad(), observation.attached(model):
        empty = True
        for batch in on_device(batches, computing_device(model)):
            empty = False
            observation.next_batch(batch["input_ids"], batch["attention_mask"])
            decode(model, batch["input_ids"], padding_mask(batch))
    if empty:
        raise InputError("no calibration batches; a generator can be read only once, and every round reads.")
    criterion = get_criterion(method)
    layers = observation.compute(criterion.stable_ranks)
    if criterion.gradients:
        layers = with_gradients(layers, gradient_figures(model, batches, gradient_memory))
    return score_experts(ModelStats("", "", layers), method, direction, seed)


def gradient_figures(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], gibibytes: float
) -> dict[str, dict[str, Tensor]]:
    """The figures of gradients of all layers, by name; every rank is given the same batches."""
    found: dict[str, dict[str, Tensor]] = {}
    for chunk in layer_chunks(find_moe_layers(model), gibibytes):
        sums = GradientSums(chunk)
        with evaluating(model), torch.enable_grad(), sums.attached(model):
            for batch in on_device(batches, computing_device(model)):
                output = model(input_ids=batch["input_ids"], attention_mask=padding_mask(batch), use_cache=False)
                loss_B, _ = next_token_loss(output.logits, batch)
                sums.backward(loss_B.sum())
        found |= sums.figures()
    return found


def _search(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], arguments: dict[str, Any], seed: int
) -> DiEPSearch:
    module = DiEPSearch(MoECausalLM().adopt(model), seed=seed, **arguments)
    module.configure_model()
    device = computing_device(model)
    fabric = Fabric(accelerator="cpu" if device.type == "cpu" else "auto", devices=1)
    with evaluating(model):
        module.on_fit_start()
        try:
            module.importance.to(device)
            step, *_ = fabric.setup(module, *module.configure_optimizers(), move_to_device=False)
            for number, batch in enumerate(on_device(_again_and_again(batches), device)):
                if module.done == module.updates:
                    break
                step.training_step(batch, number)
        finally:
            module.on_fit_end()
    return module


def _again_and_again(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise InputError("no calibration batches; a search reads them again and again, so no generator will do.")


def on_device(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the batches, of which all are given the same: ids and mask alone, on the device.

    A batch without a mask gets one of ones. Every rank gets as many: for the last, one that counts nowhere, if need be.
    """
    last: dict[str, Tensor] | None = None
    number = -1
    for number, batch in enumerate(_plain(batches, device)):
        last = batch
        if number % num_ranks() == rank():
            yield batch
    if last is not None and number % num_ranks() < rank():
        yield last | {"attention_mask": torch.zeros_like(last["attention_mask"])}


def _plain(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise InputError("batches must be mappings with a tensor `input_ids`.")
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask")
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask.to(device)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside the context; every part is put back into its own mode."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with unwatched():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
