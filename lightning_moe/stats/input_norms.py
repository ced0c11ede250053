"""Input norms: what every matrix of every expert is given, input by input, over text; Wanda's ``||x||_2``."""

# T tokens, N assignments sorted by expert, E experts, I inputs of a matrix: the model's width H, or the expert's F

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.files import replaced_file
from lightning_moe.moe.experts import ExpertHooks, expert_hooks
from lightning_moe.moe.layers import UNPACK, MoELayer, find_moe_layers
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.ranks import sum_over_ranks
from lightning_moe.moe.semi_structured import InputNorms, input_width
from lightning_moe.moe.skipping import Watch

VERSION = 1


class InputSums:
    """Running sums of squares of the inputs of every expert's matrices, float64, over the tokens routed to it.

    Say which tokens come next with ``next_batch``, then run the model inside ``attached()``; ``norms`` gives the
    result, summed over ranks. Padding is left out. In a model that skips experts, those count that the router chose.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = find_moe_layers(model)
        self._sums = {
            (layer.name, name): torch.zeros(layer.num_experts, _width(layer, name, stack), dtype=torch.float64)
            for layer in self.layers
            for name, stack in stacked_parameters(layer.experts).items()
        }
        self._mask_T = torch.empty(0)

    def to(self, device: torch.device) -> InputSums:
        """Keep the sums on ``device``."""
        self._sums = {key: sums.to(device) for key, sums in self._sums.items()}
        return self

    def next_batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Name the tokens of the coming forward, a row per sequence; those whose mask is 0 are not counted."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._mask_T = mask.flatten().bool()

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        hooks = {layer.name: ExpertHooks(watch=self._adder(layer)) for layer in self.layers}
        with expert_hooks(model, self.layers, hooks):
            yield

    def _adder(self, layer: MoELayer) -> Watch:
        @torch.no_grad()
        def add(stack: str, inputs_NI: Tensor, token_N: Tensor, count_E: Tensor) -> None:
            real_N = self._mask_T[token_N]
            if not bool(real_N.all()):
                expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
                inputs_NI, count_E = inputs_NI[real_N], torch.bincount(expert_N[real_N], minlength=len(count_E))
            sums_EI = self._sums[layer.name, stack]
            for expert, rows in enumerate(inputs_NI.split(count_E.tolist())):
                if len(rows):
                    sums_EI[expert] += rows.float().square().sum(0, dtype=torch.float64)

        return add

    def sums(self) -> dict[str, Tensor]:
        """What this rank has summed so far, to be given to ``load_sums`` of a later pass."""
        return {f"{layer}:{stack}": sums for (layer, stack), sums in self._sums.items()}

    def load_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on from saved sums."""
        self._sums = {(layer, stack): sums[f"{layer}:{stack}"].clone() for layer, stack in self._sums}

    def norms(self) -> InputNorms:
        """The norms, float32 on the CPU; every rank must call it. Raises ``InputError`` where one is not finite."""
        norms: dict[str, dict[str, Tensor]] = {}
        for (layer, stack), sums_EI in self._sums.items():
            norm_EI = sum_over_ranks(sums_EI.clone()).sqrt().float().cpu()
            if not bool(norm_EI.isfinite().all()):
                broken = (~norm_EI.isfinite().all(1)).nonzero().flatten().tolist()
                raise InputError(
                    f"{layer}: what the matrices {stack} of experts {broken} are given is not finite; give "
                    "--model.dtype float32 or bfloat16, unless the checkpoint is damaged."
                )
            norms.setdefault(layer, {})[stack] = norm_EI
        return norms


def _width(layer: MoELayer, name: str, stack: Tensor) -> int:
    unpack = vars(layer.experts).get(UNPACK, {})
    return input_width(layer, unpack[name]() if name in unpack else stack)


@dataclass(frozen=True)
class StoredNorms:
    """Input norms, and where they come from."""

    model_id: str
    data_fingerprint: str
    dtype: str
    """Of the weights while the inputs were summed, as ``--model.dtype`` names it."""
    norms: InputNorms
    seconds: float
    """That the pass took."""

    def save(self, file: Path) -> None:
        tensors = {f"{layer}:{stack}": norm for layer, stacks in self.norms.items() for stack, norm in stacks.items()}
        metadata = {name: str(getattr(self, name)) for name in ("model_id", "data_fingerprint", "dtype", "seconds")}
        with replaced_file(file) as beside:
            save_file(tensors, beside, metadata={"version": str(VERSION), **metadata})


def load_norms(file: Path) -> StoredNorms:
    """Read input norms. Raises ``InputError`` for a foreign or newer file."""
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("version") != str(VERSION):
                raise InputError(f"{file}: version {metadata.get('version')}, this program reads {VERSION}; remove it.")
            norms: dict[str, dict[str, Tensor]] = {}
            for key in stored.keys():  # noqa: SIM118 - not a dict
                layer, _, stack = key.rpartition(":")
                norms.setdefault(layer, {})[stack] = stored.get_tensor(key)
            model_id, fingerprint, dtype = (metadata[name] for name in ("model_id", "data_fingerprint", "dtype"))
            return StoredNorms(model_id, fingerprint, dtype, norms, float(metadata["seconds"]))
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a file of input norms ({error}); remove it.") from error
