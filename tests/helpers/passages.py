"""A traced step put together again, layer by layer."""

from __future__ import annotations

from lightning_moe.moe.layer_passages import StepBytes


def levels(step: StepBytes) -> list[int]:
    """What is there before each layer's forward, and after the last."""
    found = [step.entry]
    for layer in step.layers:
        found.append(found[-1] + layer.saved)
    return found


def forward_peak(step: StepBytes) -> int:
    forward = (level + layer.forward for level, layer in zip(levels(step), step.layers, strict=False))
    return max(*forward, step.saved + step.head)


def backward_peak(step: StepBytes) -> int:
    """With the gradients of one layer at a time."""
    backward = (level + layer.backward for level, layer in zip(levels(step), step.layers, strict=False))
    return max(*backward, step.saved + step.head_backward, step.entry + step.end)
