"""ImportanceCurve: alpha and beta of every MoE layer over the steps of a search, and as a table on disk."""

# S snapshots, E experts of one layer

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_moe.files import replaced_file

MOST_SNAPSHOTS = 400
"""More than this many are thinned out to half. Even, so that the newest stays."""


class ImportanceCurve:
    """Snapshots of alpha and beta, evenly spaced: when they are thinned out, their spacing doubles.

    Args:
        spacing: Optimiser steps between two snapshots at first.
    """

    def __init__(self, spacing: int) -> None:
        self.spacing = self._first_spacing = spacing
        self.steps: list[int] = []
        self.alphas: dict[str, list[Tensor]] = {}
        """By layer, in the order of depth: one ``(E,)`` for each of ``steps``, float32 on the CPU."""
        self.betas: dict[str, list[float]] = {}

    def is_due(self, step: int) -> bool:
        return not self.steps or step - self.steps[-1] >= self.spacing

    def add(self, step: int, logits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take a snapshot. Later steps than this one, and an earlier snapshot of it, are forgotten.

        So one curve serves one fit after another, and a search that goes back to a checkpoint.
        """
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
        if not self.steps:
            self.spacing = self._first_spacing
            self.alphas, self.betas = {name: [] for name in logits}, {name: [] for name in logits}
        for name, (alpha_E, beta) in logits.items():
            past = slice(len(self.steps), None)
            self.alphas[name][past] = [_whole(alpha_E)]
            self.betas[name][past] = [_whole(beta).item()]
        self.steps.append(step)
        if len(self.steps) > MOST_SNAPSHOTS:
            self.spacing *= 2
            self.steps = self.steps[::2]
            self.alphas = {name: past[::2] for name, past in self.alphas.items()}
            self.betas = {name: past[::2] for name, past in self.betas.items()}

    def alpha_SE(self, name: str) -> Tensor:
        """Alphas of one layer, ``(S, E)``."""
        return torch.stack(self.alphas[name])

    def gates(self) -> dict[str, Tensor]:
        """``E * softmax(alpha) * beta`` of each layer at the last snapshot, ``(E,)``; higher means keep."""
        return {
            name: past[-1].shape[0] * past[-1].softmax(0) * self.betas[name][-1] for name, past in self.alphas.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "spacing": self.spacing,
            "steps": list(self.steps),
            "alphas": {name: self.alpha_SE(name) for name in self.alphas},
            "betas": {name: list(past) for name, past in self.betas.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spacing, self.steps = state["spacing"], list(state["steps"])
        self.alphas = {name: list(alpha_SE.unbind()) for name, alpha_SE in state["alphas"].items()}
        self.betas = {name: list(past) for name, past in state["betas"].items()}

    def save_table(self, file: Path, keep: Mapping[str, Sequence[int]] | None) -> None:
        """Write a CSV with one row per snapshot and layer: ``step, layer, beta, kept, alpha_0, alpha_1, ...``

        Layers with fewer experts leave the last columns empty. ``kept`` holds ids, ascending and parted by spaces, in
        the rows of the last step alone. Nine digits give every float32 back.
        """
        most = max(past[-1].shape[0] for past in self.alphas.values())
        with replaced_file(file) as beside, beside.open("w", newline="") as lines:
            table = csv.writer(lines, lineterminator="\n")
            table.writerow(["step", "layer", "beta", "kept", *(f"alpha_{expert}" for expert in range(most))])
            for number, step in enumerate(self.steps):
                last = keep is not None and number == len(self.steps) - 1
                for name, past in self.alphas.items():
                    kept = " ".join(map(str, sorted(keep[name]))) if keep is not None and last else ""
                    alphas = [f"{value:.9g}" for value in past[number].tolist()]
                    alphas += [""] * (most - len(alphas))
                    table.writerow([step, name, f"{self.betas[name][number]:.9g}", kept, *alphas])


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a sharded tensor all of it, in which all ranks take part."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", torch.float32, copy=True)
