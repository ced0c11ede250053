"""Weight gradients of the experts: their sums over text, some layers at a time, and what these say."""

# E experts, H model width, F expert width: the hidden neurons of an expert

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import UNPACK, MoELayer
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.ranks import gathered, num_ranks, rank, sum_over_ranks
from lightning_moe.moe.split_tensors import is_split, local, whole
from lightning_moe.stats.expert_stats import OUTLIER_STDS
from lightning_moe.stats.layer_stats import LayerStats, only_experts

SMALLEST_STD = 1e-30
"""Stands for the spread of a gradient that never varies, as that of an expert without tokens."""

GRADIENT_MEMORY = 8.0
"""GiB of sums that a rank holds at once, where nobody says otherwise."""

BLOCK_VALUES = 1 << 15
"""Values of a gradient that are looked at in float64 at once: few enough to stay in a core's cache."""

MULTIPLIED = 1 << 14
"""Values of each expert's gradient that are multiplied at once, in float32."""


class GradientSums:
    """Sums, over backward passes, of the gradients of some layers' expert matrices.

    They are float32 whatever the type of the weights, and of a model that is split over ranks each holds its part.
    Biases do not count. Raises ``InputError`` for packed experts, which have no gradients.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        for layer in layers:
            if UNPACK in vars(layer.experts):
                raise InputError(
                    f"{layer.name}: packed experts (moe_fsdp: quantize) have no gradients; leave quantize out."
                )
        self.layers = list(layers)
        self._sums: dict[tuple[str, str], Tensor] = {}

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the context ``backward`` adds to the sums, and the layers' matrices alone take gradients.

        The model keeps the gradients it had. Modules set to recompute activations do so, although nothing else is in
        training mode.
        """
        kept = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
        recompute = {module: module.training for module in model.modules() if _recomputes(module)}
        stacks = {
            (layer.name, name): stack
            for layer in self.layers
            for name, stack in stacked_parameters(layer.experts).items()
        }
        handles = []
        try:
            for parameter in kept:
                parameter.requires_grad_(False)
                parameter.grad = None
            for module in recompute:
                module.training = True
            for key, stack in stacks.items():
                stack.requires_grad_(True)
                handles.append(stack.register_post_accumulate_grad_hook(self._adder(key)))
            torch.clear_autocast_cache()  # copies of weights that were made without gradients would be taken again
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, training in recompute.items():
                module.training = training
            for parameter, (requires_grad, gradient) in kept.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``: the sum over tokens, so that the size of a batch is no matter."""
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        torch.clear_autocast_cache()

    def _adder(self, key: tuple[str, str]) -> Callable[[Tensor], None]:
        def add(stack: Tensor) -> None:
            gradient, stack.grad = stack.grad, None  # before the next one is made: one in the weights' type at a time
            assert gradient is not None
            if key in self._sums:
                self._sums[key] += gradient
            else:
                self._sums[key] = gradient.float()

        return add

    def figures(self) -> dict[str, dict[str, Tensor]]:
        """The gradient figures of ``LayerStats`` by layer name, on the CPU; every rank must call it, once.

        One matrix stack of one layer is gathered at a time, and is gone then. Raises ``InputError`` where a gradient is
        not finite. Of experts that are masked out there are none.
        """
        return {layer.name: self._layer_figures(layer) for layer in self.layers}

    def _layer_figures(self, layer: MoELayer) -> dict[str, Tensor]:
        num_experts, device = layer.num_experts, layer.router_weight.device
        dot_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        sums_3E = torch.zeros(3, num_experts, dtype=torch.float64, device=device)
        for name, stack in stacked_parameters(layer.experts).items():
            gradient = self._gathered(layer, name, stack)
            dot_EE += _products(gradient)
            for gradient_EHF in layer.matrices_of(name, gradient):
                for expert in range(rank(), num_experts, num_ranks()):  # ranks share the work
                    sums_3E[:, expert] += neuron_figures(gradient_EHF[expert])
        dot_EE, sums_3E = sum_over_ranks(dot_EE).cpu(), sum_over_ranks(sums_3E).cpu()
        norm_E = dot_EE.diagonal().sqrt()
        if not bool(norm_E.isfinite().all()):
            broken = (~norm_E.isfinite()).nonzero().flatten().tolist()
            raise InputError(
                f"{layer.name}: the gradients of experts {broken} are not finite; give --model.dtype float32 or "
                "bfloat16, unless the checkpoint is damaged."
            )
        log_std_E, outliers_E, column_norm_E = sums_3E
        figures = {
            "gradient_cosine_EE": dot_EE / (norm_E[:, None] * norm_E).clamp(min=torch.finfo(torch.float64).tiny),
            "gradient_log_std_E": log_std_E,
            "gradient_outliers_E": outliers_E,
            "gradient_norm_E": column_norm_E,
        }
        return figures if layer.kept is None else only_experts(figures, layer.kept)

    def _gathered(self, layer: MoELayer, name: str, stack: Tensor) -> Tensor:
        """The sum over all ranks of one stack's gradient, as a whole; it is held no longer."""
        held = self._sums.pop((layer.name, name), None)
        if held is None:
            return torch.zeros(stack.shape, dtype=torch.float32, device=layer.router_weight.device)
        if is_split(held):
            return whole(held).mul_(num_ranks())  # FSDP2 has averaged over ranks
        return sum_over_ranks(held)


def neuron_figures(gradient_HF: Tensor) -> Tensor:
    """What one matrix of an expert adds to its log std, its outliers and its norm: three numbers, float64.

    MC-Suite takes the measures of activations, tokens by dimensions, of gradients and does not say what stands for
    either. Here the expert's hidden neurons stand for tokens, and the model's width for dimensions: every matrix of an
    expert has one side of each, however it is stored, and the order of neurons means nothing. The figures of an
    expert are sums over its matrices.
    """
    width, neurons = gradient_HF.shape
    sums_2H = torch.zeros(2, width, dtype=torch.float64, device=gradient_HF.device)
    outliers = torch.zeros((), dtype=torch.float64, device=gradient_HF.device)
    for block_HF in gradient_HF.split(max(1, BLOCK_VALUES // width), dim=1):
        block_HF = block_HF.double()
        sums_2H[0] += block_HF.sum(1)
        sums_2H[1] += block_HF.square().sum(1)
        off_HF = block_HF - block_HF.mean(0)
        limit_F = OUTLIER_STDS * off_HF.square().mean(0).sqrt()
        outliers += (off_HF.abs_() > limit_F).count_nonzero()
    variance_H = sums_2H[1] / neurons - (sums_2H[0] / neurons).square()
    log_std = variance_H.clamp(min=SMALLEST_STD**2).log().sum() / 2
    return torch.stack([log_std, outliers, sums_2H[1].sqrt().sum()])


def _products(gradient: Tensor) -> Tensor:
    """This rank's share of the products of the experts' flattened gradients, ``(E, E)``: a float64 sum of blocks."""
    flat = gradient.flatten(1)
    dot_EE = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    with torch.autocast(flat.device.type, enabled=False):
        for number, block in enumerate(flat.split(MULTIPLIED, dim=1)):
            if number % num_ranks() == rank():
                dot_EE += block @ block.T
    return dot_EE


def _recomputes(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def check_gradient_memory(option: str, gibibytes: float) -> None:
    """Raise ``InputError`` for what is no size."""
    if not gibibytes > 0:
        raise InputError(f"{option} {gibibytes:g}: GiB above 0.")


def chunks_of(sizes: Sequence[int], gibibytes: float) -> list[list[int]]:
    """Places of layers whose sums have these sizes, in order: as many together as find room, but one at least."""
    most, held = gibibytes * (1 << 30), 0
    chunks: list[list[int]] = []
    for place, size in enumerate(sizes):
        if not chunks or held + size > most:
            chunks.append([])
            held = 0
        chunks[-1].append(place)
        held += size
    return chunks


def layer_chunks(layers: Sequence[MoELayer], gibibytes: float) -> list[list[MoELayer]]:
    """The layers in their order, as many together as have sums of at most so many GiB on each rank, but one at least.

    Every rank must call it.
    """
    return [[layers[place] for place in chunk] for chunk in chunks_of(sum_bytes(layers), gibibytes)]


def sum_bytes(layers: Sequence[MoELayer]) -> list[int]:
    """What the sums of each layer take on the rank that holds most; every rank must call it."""
    own = [4 * sum(local(stack).numel() for stack in stacked_parameters(layer.experts).values()) for layer in layers]
    return [max(sizes) for sizes in zip(*gathered(own), strict=True)]


def trade(chunks: Sequence[Sequence[int]], gibibytes: float) -> str:
    """One line for people: how many passes the gradients take, and what they hold; of the sizes in each chunk."""
    most = max(map(sum, chunks))
    size = f"{most / (1 << 30):.3g} GiB" if most >> 30 else f"{most / (1 << 20):.3g} MiB"
    passes = f"{len(chunks)} passes" if len(chunks) > 1 else "1 pass"
    layers, at_once = sum(map(len, chunks)), max(map(len, chunks))
    return (
        f"gradients of {layers} layers: {passes} of forward and backward over the text, {at_once} layers at once, "
        f"holding {size} of sums on each rank (gradient_memory {gibibytes:g} GiB)"
    )


def with_gradients(layers: Sequence[LayerStats], figures: Mapping[str, Mapping[str, Tensor]]) -> list[LayerStats]:
    """The statistics and these figures, given by layer name."""
    return [replace(layer, **dict[str, Any](figures[layer.shape.name])) for layer in layers]
