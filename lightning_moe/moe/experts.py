"""The experts function: every expert of a layer on its tokens, observed and gated on the way.

Registered with transformers under ``lightning_moe``, it serves every architecture that hands its router's choice
to its experts; no modelling file is touched.
"""

# T tokens, K experts per token, N = T * K assignments sorted by expert, E experts, H model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.moe.layers import MoELayer
from lightning_moe.moe.skipping import Watch, choose, compute_rows, weighted_sum

IMPLEMENTATION = "lightning_moe"


@dataclass(frozen=True)
class Assignments:
    """What the experts of one layer computed in one forward: a row per (token, expert), sorted by expert."""

    outputs_NH: Tensor
    """Expert outputs before the routing weight."""
    token_N: Tensor
    weight_N: Tensor
    """Routing weights as given by the router, gates left out."""
    count_E: Tensor


Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(expert_ids_TK, weights_TK) -> (expert ids, weights)``: another choice than the router's, of any width."""


@dataclass
class ExpertHooks:
    """What to do inside one layer's experts function."""

    observe: Callable[[Assignments], None] | None = None
    gates_E: Tensor | None = None
    """A factor on each expert's routing weight, in its own precision; gradients reach it."""
    route: Route | None = None
    """Send tokens elsewhere than the router says; nothing is skipped then."""
    watch: Watch | None = None
    """See what every matrix is given."""


def experts_forward(experts: nn.Module, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, ``(T, H)``: the same as the stock grouped path.

    In a model that skips, observers see every expert the router chose: what they watch is computed all the same, and
    what is skipped gets weight 0. A gate works on what skipping left.
    """
    hooks: ExpertHooks | None = getattr(experts, "lightning_moe_hooks", None)
    observe, watch = (None, None) if hooks is None else (hooks.observe, hooks.watch)
    keep_TK = None
    if hooks is not None and hooks.route is not None:
        expert_ids_TK, weights_TK = hooks.route(expert_ids_TK, weights_TK)
        given_TK = weights_TK
    else:
        given_TK = weights_TK
        keep_TK, weights_TK = choose(experts, expert_ids_TK, weights_TK)
    if hooks is not None and hooks.gates_E is not None:
        # index_select, since the backward of fancy indexing is many times slower
        weights_TK = weights_TK * hooks.gates_E.index_select(0, expert_ids_TK.flatten()).view_as(weights_TK)
    rows = compute_rows(experts, hidden_TH, expert_ids_TK, None if observe or watch else keep_TK, watch)
    if observe is not None:
        observe(Assignments(rows.outputs_NH, rows.token_N, given_TK.flatten()[rows.place_N], rows.count_E))
    return weighted_sum(rows, weights_TK).to(hidden_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


@contextmanager
def expert_hooks(model: PreTrainedModel, layers: list[MoELayer], hooks: Mapping[str, ExpertHooks]) -> Iterator[None]:
    """Run ``model`` through ``experts_forward`` with ``hooks`` (by layer name) inside the context.

    Contexts nest: what an inner one does not set, an outer one's hooks still do.
    """
    implementation = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    outer: dict[str, ExpertHooks] = {}
    for layer in layers:
        outer[layer.name] = vars(layer.experts).get("lightning_moe_hooks", ExpertHooks())
        inner = hooks.get(layer.name, ExpertHooks())
        vars(layer.experts)["lightning_moe_hooks"] = ExpertHooks(
            inner.observe or outer[layer.name].observe,
            outer[layer.name].gates_E if inner.gates_E is None else inner.gates_E,
            inner.route or outer[layer.name].route,
            inner.watch or outer[layer.name].watch,
        )
    try:
        yield
    finally:
        for layer in layers:
            vars(layer.experts)["lightning_moe_hooks"] = outer[layer.name]
            if outer[layer.name] == ExpertHooks():
                del vars(layer.experts)["lightning_moe_hooks"]
        model.set_experts_implementation(implementation)
