"""How often a step of each job goes through each layer: what its time is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_moe.evaluation.job_setup import Job, Setup
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.weights import Weight
from lightning_moe.search.expert_scan import can_spare_one
from lightning_moe.stats.gradients import chunks_of, trade


@dataclass(frozen=True)
class Passages:
    """How often a step works with one weight.

    Args:
        forward: In forwards, those of a teacher too.
        backward: On the way back through the activations.
        gradients: When the weight's own gradient is made.
    """

    forward: int
    backward: int = 0
    gradients: int = 0


STEPS: dict[Job, Passages] = {
    "score": Passages(1),
    "2:4-wanda": Passages(1),
    "evaluate": Passages(1),
    "search": Passages(2, 1),  # as teacher and as student
    "tune all": Passages(1, 1, 1),
    "tune routers+norms": Passages(1, 1),
    "tune routers": Passages(1, 1),
}
"""Of the jobs that go through all layers alike."""


def passages(
    job: Job, setup: Setup, weights: Sequence[Weight], shapes: Sequence[LayerShape]
) -> Callable[[Weight], Passages]:
    """Tells of each weight how often a step works with it; ``shapes`` are the model's MoE layers."""
    if job == "scan":
        return lambda weight: Passages(1 + scanned_experts(shapes, weight.layer))
    if job == "gradients":
        chunks = gradient_chunks(weights, setup)

        def through(weight: Weight) -> Passages:
            """Of each chunk's pass the forward is whole; the backward ends at the chunk's first layer."""
            back = sum(weight.layer is None or min(chunk) <= weight.layer for chunk in chunks)
            return Passages(len(chunks), back, int(weight.stack))

        return through
    return lambda weight: STEPS[job]


def scanned_experts(shapes: Sequence[LayerShape], layer: int | None) -> int:
    """For how many experts ``scan`` runs a decoder layer, or the head (None), on each batch.

    For each expert that its router can spare the layers from the expert's own on, and the head. That is on all windows
    of the batch: it is assumed that each holds a token that is routed otherwise without the expert. So it is wherever
    routing weights are shares of a softmax over all experts; elsewhere windows that meet an expert nowhere cost
    nothing, and a scan takes less, the more so the more experts there are and the shorter the windows.
    """
    return sum(
        shape.num_experts for shape in shapes if can_spare_one(shape) and (layer is None or shape.index <= layer)
    )


def gradient_chunks(weights: Sequence[Weight], setup: Setup) -> list[dict[int, int]]:
    """The chunks of layers that ``gradients`` takes one after another: by decoder layer the bytes of its sums."""
    sizes: dict[int, int] = {}
    for weight in weights:
        if weight.stack and weight.layer is not None:
            sizes[weight.layer] = sizes.get(weight.layer, 0) + 4 * weight.on_rank(setup.layout.ranks)
    layers = list(sizes)
    chunks = chunks_of([sizes[layer] for layer in layers], setup.gradient_memory)
    return [{layers[place]: sizes[layers[place]] for place in chunk} for chunk in chunks]


def note_on(job: Job, setup: Setup, weights: Sequence[Weight], shapes: Sequence[LayerShape]) -> str | None:
    """One line for people on what a job's time is made of, where that is not one pass."""
    if job == "gradients":
        chunks = gradient_chunks(weights, setup)
        return trade([list(chunk.values()) for chunk in chunks], setup.gradient_memory)
    if job == "scan":
        runs, layers = scanned_experts(shapes, None), 1 + max(weight.layer or 0 for weight in weights)
        through = sum(scanned_experts(shapes, layer) for layer in range(layers)) / runs
        return (
            f"scan: {runs} forwards of each batch beside the first, through {through:.1f} of {layers} layers on "
            "average, at most"
        )
    return None
