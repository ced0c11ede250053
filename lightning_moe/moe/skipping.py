"""Experts that skip: a token leaves out those of its experts that matter little beside its first (DiEP, eq. 12).

This file needs nothing but torch and transformers: a copy of it travels with every checkpoint that skips by itself,
so that ``trust_remote_code=True`` loads one where lightning_moe is not installed. The tables stand in the config as
``expert_skipping``; ``attach_skipping`` hands them to the experts of a just built model. A skipped expert is not
computed: the grouped products run over fewer rows.
"""

# T tokens, K experts per token, N computed assignments sorted by expert, E experts, H model width, F expert width

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "expert_skipping"
"""The name of the experts function here among those of transformers."""

CONFIG_KEY = "expert_skipping"
"""The name in the config, and of the attribute of an experts module that skips."""

VERSION = 1


class LayerSkipping:
    """The rule of one layer, and how often it skipped.

    With ``e0`` the expert of a token's largest routing weight, expert ``e`` is skipped when
    ``w_e < gamma1 * gamma2[e0, e] * w_e0``; the weights of the others grow so that their sum stays as it was.
    NAEE's rule is ``gamma2 = 1``.
    """

    def __init__(self, gamma1: float, gamma2: list[list[float]], rule: str) -> None:
        # A model is built on the meta device and in its own dtype; this tensor is neither.
        table_EE = torch.tensor(gamma2, dtype=torch.float32, device="cpu")
        self.threshold_EE = gamma1 * (table_EE if rule == "diep" else torch.ones_like(table_EE))
        self.counted_T: Tensor | None = None
        """Tokens that count in ``skipped`` and ``seen``, such as all but padding; None for all."""
        self.skipped = self.seen = 0

    def choose(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Which assignments stay, and the weights with zeros at the others: two ``(T, K)`` tensors."""
        if self.threshold_EE.device != expert_ids_TK.device:
            self.threshold_EE = self.threshold_EE.to(expert_ids_TK.device)
        exact_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
        first_T1 = exact_TK.detach().argmax(-1, keepdim=True)
        threshold_TK = self.threshold_EE[expert_ids_TK.gather(-1, first_T1), expert_ids_TK]
        skip_TK = exact_TK.detach() < threshold_TK * exact_TK.detach().gather(-1, first_T1)
        skip_TK.scatter_(-1, first_T1, False)  # a threshold above 1 would skip the first beside itself
        self._count(skip_TK)
        kept_TK = exact_TK.masked_fill(skip_TK, 0.0)
        tiny = torch.finfo(kept_TK.dtype).tiny
        # Where nothing is skipped the two sums are the same number, and the weights stay bit by bit.
        scale_T1 = exact_TK.sum(-1, keepdim=True) / kept_TK.sum(-1, keepdim=True).clamp(min=tiny)
        return ~skip_TK, (kept_TK * scale_T1).to(weights_TK.dtype)

    def _count(self, skip_TK: Tensor) -> None:
        if self.counted_T is not None:
            skip_TK = skip_TK[self.counted_T]
        self.skipped += int(skip_TK.sum())
        self.seen += skip_TK.numel()


@dataclass(frozen=True)
class ComputedRows:
    """Expert outputs, a row per computed assignment, sorted by expert."""

    outputs_NH: Tensor
    """Before the routing weight."""
    place_N: Tensor
    """Where in the flattened ``(T, K)`` choice of the router each row belongs."""
    count_E: Tensor
    shape_TK: torch.Size

    @property
    def token_N(self) -> Tensor:
        return self.place_N // self.shape_TK[-1]


Watch = Callable[[str, Tensor, Tensor, Tensor], None]
"""``(stack, inputs, token of each row, count_E)``: sees what the matrices of a stack are given, sorted by expert."""


def skipping_forward(experts: nn.Module, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of the outputs of the experts that stay, ``(T, H)``."""
    keep_TK, weights_TK = choose(experts, expert_ids_TK, weights_TK)
    return weighted_sum(compute_rows(experts, hidden_TH, expert_ids_TK, keep_TK), weights_TK).to(hidden_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skipping_forward)


def choose(experts: nn.Module, expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which assignments stay (None for all) and the weights after skipping."""
    skipping: LayerSkipping | None = getattr(experts, CONFIG_KEY, None)
    if skipping is None or expert_ids_TK.shape[0] == 0:
        return None, weights_TK
    return skipping.choose(expert_ids_TK, weights_TK)


def compute_rows(
    experts: nn.Module,
    hidden_TH: Tensor,
    expert_ids_TK: Tensor,
    keep_TK: Tensor | None = None,
    watch: Watch | None = None,
) -> ComputedRows:
    """Run every expert on its tokens; assignments that ``keep_TK`` leaves out are not computed."""
    if keep_TK is None:
        expert_N, place_N = expert_ids_TK.flatten().sort(stable=True)
    else:
        place_N = keep_TK.flatten().nonzero().squeeze(1)
        expert_N, order_N = expert_ids_TK.flatten()[place_N].sort(stable=True)
        place_N = place_N[order_N]
    count_E = torch.bincount(expert_N, minlength=_num_experts(experts))
    token_N = place_N // expert_ids_TK.shape[-1]

    def see(stack: str, inputs: Tensor) -> None:
        if watch is not None:
            watch(stack, inputs, token_N, count_E)

    outputs_NH = _outputs(experts, hidden_TH.index_select(0, token_N), expert_N, count_E, see)
    return ComputedRows(outputs_NH, place_N, count_E, expert_ids_TK.shape)


def weighted_sum(rows: ComputedRows, weights_TK: Tensor) -> Tensor:
    """Sum of each token's outputs by weight, ``(T, H)``; assignments without a row have weight 0."""
    count = rows.place_N.shape[0]
    position_TK = rows.place_N.new_full((weights_TK.numel(),), -1)
    position_TK[rows.place_N] = torch.arange(count, device=position_TK.device)
    position_TK = position_TK.view(rows.shape_TK)
    if count < position_TK.numel():
        # A skipped expert's place is taken by a row of the same token, so that no other token's NaN gets in.
        position_TK = torch.where(position_TK < 0, position_TK.amax(-1, keepdim=True), position_TK)
    outputs_TKH = rows.outputs_NH.index_select(0, position_TK.flatten()).view(*rows.shape_TK, -1)
    return (weights_TK.to(outputs_TKH.dtype).unsqueeze(1) @ outputs_TKH).squeeze(1)


def _num_experts(experts: nn.Module) -> int:
    stack: Tensor = getattr(experts, "down_proj")  # noqa: B009 - of any module, which the type does not know
    return stack.shape[0]


def _outputs(
    experts: nn.Module, inputs_NH: Tensor, expert_N: Tensor, count_E: Tensor, see: Callable[[str, Tensor], None]
) -> Tensor:
    """Outputs of sorted assignments, ``(N, H)``; the flags are those transformers' own decorator sets."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    see(name, inputs_NH)
    inner_NF = _grouped_linear(experts, name, inputs_NH, expert_N, count_E)
    inner_NF = experts._apply_gate(inner_NF) if experts.has_gate else experts.act_fn(inner_NF)  # type: ignore[operator]
    see("down_proj", inner_NF)
    outputs_NH = _grouped_linear(experts, "down_proj", inner_NF, expert_N, count_E)
    return experts.post_expert_norm(outputs_NH) if experts.has_post_expert_norm else outputs_NH  # type: ignore[operator]


def _grouped_linear(experts: nn.Module, name: str, inputs: Tensor, expert_N: Tensor, count_E: Tensor) -> Tensor:
    unpack = vars(experts).get("lightning_moe_unpack")
    if unpack is None:
        return _multiplied(experts, name, getattr(experts, name), inputs, expert_N, count_E)

    def unpacked(rows: Tensor) -> Tensor:
        return _multiplied(experts, name, unpack[name](), rows, expert_N, count_E)

    # Unpacked anew for backward: kept until then, the weights of all layers would be there at once.
    outputs: Tensor = checkpoint(unpacked, inputs, use_reentrant=False)
    return outputs


def _multiplied(
    experts: nn.Module, name: str, weight: Tensor, inputs: Tensor, expert_N: Tensor, count_E: Tensor
) -> Tensor:
    if not experts.is_transposed:
        weight = weight.transpose(-2, -1)
    inputs = inputs.to(weight.dtype)
    if _grouped_mm_takes(inputs, weight):
        ends_E = count_E.cumsum(0, dtype=torch.int32)
        outputs = functional.grouped_mm(inputs, weight, offs=ends_E)
    else:
        groups = zip(torch.split(inputs, count_E.tolist()), weight, strict=True)
        outputs = torch.cat([rows @ matrix for rows, matrix in groups])
    return outputs + getattr(experts, f"{name}_bias")[expert_N] if experts.has_bias else outputs


def _grouped_mm_takes(inputs: Tensor, weight: Tensor) -> bool:
    """``grouped_mm`` knows no float64 and wants rows of a multiple of 16 bytes; CUDA needs compute 8.0."""
    if inputs.dtype == torch.float64:
        return False
    if any(size * inputs.element_size() % 16 for size in weight.shape[1:]):
        return False
    return inputs.device.type != "cuda" or torch.cuda.get_device_capability(inputs.device) >= (8, 0)


def attach_skipping(model: Any, experts: Mapping[int, nn.Module]) -> None:
    """Let the experts of ``model`` (by decoder layer) skip as its config says, or not at all.

    Setting another experts implementation afterwards leaves skipping out, as it leaves out this function.
    """
    entry: Any = getattr(model.config.get_text_config(), CONFIG_KEY, None)
    tables = {} if entry is None else _checked(entry)["layers"]
    active = entry is not None and entry["active"]
    for index, module in experts.items():
        vars(module).pop(CONFIG_KEY, None)
        table = tables.get(str(index))
        if table is None:
            continue
        have, told = _num_experts(module), len(table["gamma2"])
        if have != told or any(len(row) != told for row in table["gamma2"]):
            raise ValueError(
                f"{CONFIG_KEY} in config.json: layer {index} has {have} experts, but its table is for {told}."
            )
        if active:
            vars(module)[CONFIG_KEY] = LayerSkipping(table["gamma1"], table["gamma2"], entry["rule"])
    ours = model.get_experts_implementation()[""] == IMPLEMENTATION
    if active != ours and (active or entry is not None):
        model.set_experts_implementation(IMPLEMENTATION if active else None)  # None: transformers' default


def _checked(entry: Any) -> Any:
    """The entry of the config, or a ``ValueError`` that says what is wrong with it."""
    if not isinstance(entry, dict) or entry.get("version") != VERSION:
        found = entry.get("version") if isinstance(entry, dict) else entry
        raise ValueError(f"{CONFIG_KEY} in config.json: version {found}, this program reads {VERSION}.")
    if entry.get("rule") not in ("diep", "naee") or not isinstance(entry.get("active"), bool):
        raise ValueError(f"{CONFIG_KEY} in config.json: `rule` must be diep or naee, `active` true or false.")
    layers = entry.get("layers")
    if not isinstance(layers, dict) or not all(
        isinstance(table, dict) and isinstance(table.get("gamma1"), float | int) and table.get("gamma2")
        for table in layers.values()
    ):
        raise ValueError(f"{CONFIG_KEY} in config.json: every layer needs `gamma1` and `gamma2`.")
    return entry
