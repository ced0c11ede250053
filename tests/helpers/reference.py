"""Slow and obvious: one token, one expert, one pair at a time, in Python numbers.

Formulas are written from the papers (MC-Suite 2504.05586, REAP 2510.13999, MAN 2606.15716, SEER-MoE 2404.05089,
Expert Trimming 2406.02500, Switch Transformer 2101.03961), never from the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Vector = list[float]


# ---------------------------------------------------------------------------------------------- vectors


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = norm(a) * norm(b)
    return dot(a, b) / lengths if lengths else 0.0


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def standard_deviation(values: Sequence[float]) -> float:
    """Of the whole population: divided by n."""
    middle = mean(values)
    return math.sqrt(mean([(value - middle) ** 2 for value in values]))


def softmax(logits: Sequence[float]) -> Vector:
    highest = max(logits)
    powers = [math.exp(x - highest) for x in logits]
    return [x / math.fsum(powers) for x in powers]


# --------------------------------------------------------------------------------------- raw observation


@dataclass(frozen=True)
class Visit:
    """One token at one of its experts."""

    expert: int
    weight: float
    """As the router gave it."""
    output: Vector
    """Of the expert, before the weight."""


@dataclass(frozen=True)
class SeenToken:
    """One token at one MoE layer."""

    token_id: int
    probabilities: Vector
    """Softmax of the router's logits, over all experts."""
    visits: list[Visit]
    sequence: int = 0
    logits: Sequence[float] = ()
    """The router's logits where they are known; else those that its probabilities have, up to a shift."""


@dataclass(frozen=True)
class RawLayer:
    """All that happened at one MoE layer, and its weights taken apart."""

    num_experts: int
    vocab_size: int
    tokens: list[SeenToken]
    router_rows: list[Vector] = field(default_factory=list)
    matrices: list[list[Tensor]] = field(default_factory=list)
    """Per expert, its matrices."""
    gradients: list[list[Tensor]] = field(default_factory=list)
    """Per expert, the summed gradients of its matrices, a row for each hidden neuron."""
    cosines: tuple[float, float] = (0.0, 0.0)
    """Of the residual stream before and after the MoE block, and the whole decoder layer, summed over tokens."""

    def outputs(self, expert: int) -> list[Vector]:
        return [visit.output for token in self.tokens for visit in token.visits if visit.expert == expert]

    def token_ids(self, expert: int) -> set[int]:
        return {token.token_id for token in self.tokens if expert in self.chosen(token)}

    @staticmethod
    def chosen(token: SeenToken) -> list[int]:
        return [visit.expert for visit in token.visits]


def run_alone(experts: nn.Module, expert: int, inputs_RH: Tensor) -> Tensor:
    """The outputs of one expert, ``(R, H)``, by the loop in the architecture's own modelling file."""
    ids = torch.full((inputs_RH.shape[0], 1), expert)
    weights = torch.ones(inputs_RH.shape[0], 1, dtype=inputs_RH.dtype)
    return type(experts).forward.__wrapped__(experts, inputs_RH, ids, weights)  # type: ignore[attr-defined]


def weighted_sum(
    experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gates_E: Tensor | None = None
) -> Tensor:
    """What the experts of a layer give back, token by token: ``sum_k weight * gate * f(x)``."""
    rows = []
    for hidden_H, ids, weights in zip(hidden_TH, ids_TK.tolist(), weights_TK, strict=True):
        row = torch.zeros_like(hidden_H)
        for expert, weight in zip(ids, weights, strict=True):
            gate = 1.0 if gates_E is None else gates_E[expert]
            row = row + weight * gate * run_alone(experts, expert, hidden_H[None])[0]
        rows.append(row)
    return torch.stack(rows)


@dataclass(frozen=True)
class Call:
    """What one experts module was given in one forward."""

    router_input_TH: Tensor
    hidden_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def watch(model: PreTrainedModel, parts: Sequence[tuple[nn.Module, nn.Module]], **inputs: Any) -> list[Call]:
    """Run the stock model and note what each (router, experts) was given."""
    router_inputs: dict[int, Tensor] = {}
    given: dict[int, tuple[Tensor, ...]] = {}
    handles = []
    for number, (router, experts) in enumerate(parts):
        handles.append(
            router.register_forward_pre_hook(lambda _, args, number=number: router_inputs.update({number: args[0]}))
        )
        handles.append(experts.register_forward_pre_hook(lambda _, args, number=number: given.update({number: args})))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    calls = []
    for number in range(len(parts)):
        hidden, ids, weights = given[number]
        flat = hidden.reshape(-1, hidden.shape[-1])
        router_input = router_inputs[number]
        calls.append(
            Call(
                router_input.reshape(-1, router_input.shape[-1]),
                flat,
                ids.reshape(flat.shape[0], -1),
                weights.reshape(flat.shape[0], -1),
            )
        )
    return calls


def router_rows(router: nn.Module) -> tuple[list[Vector], Vector]:
    """The router's matrix, a row per expert, and its bias (zeros where there is none)."""
    matrix = next(p for p in router.parameters() if p.dim() == 2)
    biases = [p for name, p in router.named_parameters() if p.dim() == 1 and name.rpartition(".")[2] == "bias"]
    bias = biases[0].tolist() if biases else [0.0] * matrix.shape[0]
    return matrix.double().tolist(), bias


def expert_matrices(experts: nn.Module, expert: int, gradients: bool = False) -> list[Tensor]:
    """Gate, up and down of one expert, or their gradients. GPT-OSS stores gate and up as every other column, all
    others one after the other as rows."""
    stacks = experts.gate_up_proj, experts.down_proj
    fused, down = ((stack.grad if gradients else stack.detach())[expert] for stack in stacks)
    if "GptOss" in type(experts).__name__:
        return [fused[:, 0::2], fused[:, 1::2], down]
    half = fused.shape[0] // 2
    return [fused[:half], fused[half:], down]


def inner_activations(experts: nn.Module, expert: int, inputs_RH: Tensor) -> Tensor:
    """What one expert's down matrix is given, ``(R, F)``: its formula written out, in the type of the inputs."""
    gate, up, _ = (matrix.to(inputs_RH.dtype) for matrix in expert_matrices(experts, expert))
    if "GptOss" not in type(experts).__name__:
        return nn.functional.silu(nn.functional.linear(inputs_RH, gate)) * nn.functional.linear(inputs_RH, up)
    bias = experts.gate_up_proj_bias[expert].detach().to(inputs_RH.dtype)  # type: ignore[index, union-attr]
    gated = (inputs_RH @ gate + bias[0::2]).clamp(max=7.0)
    linear = (inputs_RH @ up + bias[1::2]).clamp(-7.0, 7.0)
    return gated * torch.sigmoid(1.702 * gated) * (linear + 1)


def neuron_gradients(experts: nn.Module, expert: int) -> list[Tensor]:
    """The gradients of gate, up and down of one expert, a row for each hidden neuron. GPT-OSS has neurons in the
    columns of gate and up and the rows of down, all others the other way."""
    gate, up, down = expert_matrices(experts, expert, gradients=True)
    return [gate.T, up.T, down] if "GptOss" in type(experts).__name__ else [gate, up, down.T]


def raw_gradients(model: PreTrainedModel, experts: Sequence[nn.Module], windows: Sequence[Tensor]) -> list[RawLayer]:
    """The stock model, one window after another, and each position's loss by itself, summed up in float64."""
    model.set_experts_implementation("eager")
    sums = [[[0.0] * 3 for _ in module.down_proj] for module in experts]  # type: ignore[union-attr]
    for window in windows:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        losses = [
            -logits[position].float().log_softmax(-1)[window[position + 1]] for position in range(len(window) - 1)
        ]
        torch.stack(losses).sum().backward()
        for layer, module in zip(sums, experts, strict=True):
            for expert, matrices in enumerate(layer):
                for turn, gradient in enumerate(neuron_gradients(module, expert)):
                    matrices[turn] = matrices[turn] + gradient.double()  # type: ignore[call-overload]
    model.zero_grad()
    return [RawLayer(len(layer), 0, [], gradients=layer) for layer in sums]  # type: ignore[arg-type]


def raw_layers(
    model: PreTrainedModel,
    parts: Sequence[tuple[nn.Module, nn.Module]],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> list[RawLayer]:
    """Observe a model by running each expert by itself on each of its tokens. Padding is left out."""
    counted = [True] * input_ids.numel() if attention_mask is None else attention_mask.flatten().bool().tolist()
    token_ids = input_ids.flatten().tolist()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    layers = []
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    cosines = [residual_cosines(model, experts, inputs, counted) for _, experts in parts]
    for turn, ((router, experts), call) in enumerate(zip(parts, watch(model, parts, **inputs), strict=True)):
        rows, bias = router_rows(router)
        tokens = []
        for position, token_id in enumerate(token_ids):
            if not counted[position]:
                continue
            x = call.router_input_TH[position].double().tolist()
            logits = [dot(row, x) + b for row, b in zip(rows, bias, strict=True)]
            with torch.no_grad():
                visits = [
                    Visit(expert, weight, run_alone(experts, expert, call.hidden_TH[position][None])[0].tolist())
                    for expert, weight in zip(
                        call.ids_TK[position].tolist(), call.weights_TK[position].tolist(), strict=True
                    )
                ]
            tokens.append(SeenToken(token_id, softmax(logits), visits, position // input_ids.shape[-1], logits))
        matrices = [expert_matrices(experts, expert) for expert in range(len(rows))]
        layers.append(RawLayer(len(rows), vocab_size, tokens, rows, matrices, cosines=cosines[turn]))
    return layers


def residual_cosines(
    model: PreTrainedModel, experts: nn.Module, inputs: Mapping[str, Any], counted: Sequence[bool]
) -> tuple[float, float]:
    """Between the decoder layer's output without and with its MoE block, and between its input and its output.

    Without the block the residual stream is left as it was before; MiniMax alone scales it, after a norm.
    """
    lists = (layer for one in model.modules() if isinstance(one, nn.ModuleList) for layer in one)
    decoder = next(layer for layer in lists if any(part is experts for part in layer.modules()))
    block = next(part for part in decoder.modules() if any(child is experts for child in part.children()))
    seen: dict[str, Tensor] = {}

    def run(name: str, hooks: Sequence[Any]) -> None:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            seen["in"] = args[0]

        handles = [decoder.register_forward_hook(note), *hooks]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()

    run("without", [block.register_forward_hook(lambda module, args, output: zeros_like(output))])
    norm_hook = getattr(decoder, "post_attention_layernorm", block).register_forward_pre_hook(
        lambda module, args: seen.update({"norm": args[0]})
    )
    run("out", [norm_hook])
    before = seen["norm" if "MiniMax" in type(decoder).__name__ else "without"]
    rows = [
        tensor.flatten(0, -2).double()[torch.tensor(counted)].tolist() for tensor in (before, seen["in"], seen["out"])
    ]
    return (
        math.fsum(cosine(one, after) for one, after in zip(rows[0], rows[2], strict=True)),
        math.fsum(cosine(one, after) for one, after in zip(rows[1], rows[2], strict=True)),
    )


def zeros_like(output: Any) -> Any:
    """What an MoE block gives that adds nothing, in the form of its output."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


# ------------------------------------------------------------------------------------------- statistics


def layer_stats(raw: RawLayer) -> dict[str, Any]:
    """Every sum over tokens, by the name of its field in ``LayerStats``."""
    experts, width = range(raw.num_experts), len(raw.tokens[0].visits[0].output)
    stats: dict[str, Any] = {"tokens": len(raw.tokens)}
    stats["layer_cosine"], stats["block_cosine"] = raw.cosines
    for name in ("count_E", "probability_E", "soft_count_E", "norm_E", "norm_sq_E", "gated_norm_E", "outliers_E"):
        stats[name] = [0.0] * raw.num_experts
    for name in ("output_sum_EH", "output_sq_EH", "unit_sum_EH"):
        stats[name] = [[0.0] * width for _ in experts]
    for name in ("together_EE", "logit_products_EE"):
        stats[name] = [[0.0] * raw.num_experts for _ in experts]
    stats["seen_EV"] = [[token_id in raw.token_ids(expert) for token_id in range(raw.vocab_size)] for expert in experts]
    for token in raw.tokens:
        chosen = raw.chosen(token)
        total = math.fsum(visit.weight for visit in token.visits)
        logits = token.logits or [math.log(p) if p else 0.0 for p in token.probabilities]
        for p in experts:
            stats["probability_E"][p] += token.probabilities[p]
            for q in experts:
                stats["together_EE"][p][q] += p in chosen and q in chosen
                stats["logit_products_EE"][p][q] += logits[p] * logits[q]
        for visit in token.visits:
            p, length = visit.expert, norm(visit.output)
            stats["count_E"][p] += 1
            stats["soft_count_E"][p] += token.probabilities[p]
            stats["norm_E"][p] += length
            stats["norm_sq_E"][p] += length**2
            stats["gated_norm_E"][p] += visit.weight / total * length
            stats["outliers_E"][p] += outliers(visit.output)
            for j, value in enumerate(visit.output):
                stats["output_sum_EH"][p][j] += value
                stats["output_sq_EH"][p][j] += value**2
                stats["unit_sum_EH"][p][j] += value / length if length else 0.0
    return stats | skipping_stats(raw)


def skipping_stats(raw: RawLayer, most: int = 16) -> dict[str, Any]:
    """The ratios of weights in 4096 bins, and the HSIC sums of pairs, on at most ``most`` tokens of a sequence."""
    experts = range(raw.num_experts)
    histogram, cross, own = (
        [0.0] * 4096,
        [[0.0] * len(experts) for _ in experts],
        [[0.0] * len(experts) for _ in experts],
    )
    for token in raw.tokens:
        if len(token.visits) > 1:
            # In float32, as routers reckon, so that a ratio on the edge of a bin falls on the same side.
            first, second = sorted((torch.tensor(visit.weight) for visit in token.visits), reverse=True)[:2]
            histogram[min(4095, int((second / first if first else first) * 4096))] += 1
    for sequence in {token.sequence for token in raw.tokens}:
        for p in experts:
            for q in experts:
                both = [t for t in raw.tokens if t.sequence == sequence and {p, q} <= set(raw.chosen(t))][:most]
                if p == q or len(both) < 4:
                    continue
                outputs = [[next(v.output for v in t.visits if v.expert == e) for t in both] for e in (p, q)]
                K, L = (u_centred(gram(rows)) for rows in outputs)
                weight = len(both) / (len(both) * (len(both) - 3))
                cross[p][q] += weight * float((K * L).sum())
                own[p][q] += weight * float((K * K).sum())
    return {"ratio_R": histogram, "hsic_EE": cross, "own_hsic_EE": own}


def gram(rows: Sequence[Vector]) -> Tensor:
    return torch.tensor([[dot(a, b) for b in rows] for a in rows], dtype=torch.float64)


def u_centred(K: Tensor) -> Tensor:
    """As Szekely and Rizzo (2014) centre: their inner product is the unbiased HSIC in another form."""
    n = K.shape[0]
    K = K - torch.diag(K.diagonal())
    centred = K - K.sum(0) / (n - 2) - K.sum(1)[:, None] / (n - 2) + K.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Of all tokens at once, rows centred (Kornblith et al. 2019, eq. 4)."""
    X, Y = (rows.double() - rows.double().mean(0) for rows in (X, Y))
    return float((X.T @ Y).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm()))


def outliers(output: Vector) -> int:
    middle, spread = mean(output), standard_deviation(output)
    return sum(abs(value - middle) > 3 * spread for value in output)


def weight_stats(raw: RawLayer) -> dict[str, Any]:
    flat = [torch.cat([matrix.double().flatten() for matrix in matrices]) for matrices in raw.matrices]
    return {
        "router_norm_E": [norm(row) for row in raw.router_rows],
        "weight_norm_E": [float(f.norm()) for f in flat],
        "weight_cosine_EE": [[float(f @ g / (f.norm() * g.norm())) for g in flat] for f in flat],
        "stable_rank_E": [mean([stable_rank(matrix) for matrix in matrices]) for matrices in raw.matrices],
    }


def stable_rank(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0


def gradient_stats(raw: RawLayer) -> dict[str, Any]:
    flat = [torch.cat([matrix.double().flatten() for matrix in matrices]) for matrices in raw.gradients]
    return {
        "gradient_cosine_EE": [
            [float(f @ g / (f.norm() * g.norm())) if f.any() and g.any() else 0.0 for g in flat] for f in flat
        ],
        "gradient_log_std_E": ege(raw),
        "gradient_outliers_E": ego(raw),
        "gradient_norm_E": egn(raw),
    }


# --------------------------------------------------------------------------------------------- criteria


def ews(raw: RawLayer) -> Vector:
    cosines = weight_stats(raw)["weight_cosine_EE"]
    return [math.fsum(row) - row[p] for p, row in enumerate(cosines)]


def rwn(raw: RawLayer) -> Vector:
    return [norm(row) for row in raw.router_rows]


def wsr(raw: RawLayer) -> Vector:
    return [mean([stable_rank(matrix) for matrix in matrices]) for matrices in raw.matrices]


def ewn(raw: RawLayer) -> Vector:
    return [math.sqrt(math.fsum(float(m.double().square().sum()) for m in matrices)) for matrices in raw.matrices]


def euf(raw: RawLayer) -> Vector:
    return [float(len(raw.outputs(p))) for p in range(raw.num_experts)]


def evc(raw: RawLayer) -> Vector:
    return [len(raw.token_ids(p)) / raw.vocab_size for p in range(raw.num_experts)]


def eas(raw: RawLayer) -> Vector:
    """Mean cosine between all outputs of p and all outputs of q, summed over q, minus the diagonal."""
    scores = []
    for p in range(raw.num_experts):
        score = 0.0
        for q in range(raw.num_experts):
            if q != p:
                score += mean([cosine(a, b) for a in raw.outputs(p) for b in raw.outputs(q)])
        scores.append(score)
    return scores


def eae(raw: RawLayer) -> Vector:
    """Sum of log std per dimension; a std of 0 counts as 1e-12, or the log would not be a number."""
    width = len(raw.tokens[0].visits[0].output)
    scores = []
    for p in range(raw.num_experts):
        columns = [[output[j] for output in raw.outputs(p)] for j in range(width)]
        scores.append(math.fsum(math.log(max(standard_deviation(column), 1e-12)) for column in columns))
    return scores


def eao(raw: RawLayer) -> Vector:
    return [float(sum(outliers(output) for output in raw.outputs(p))) for p in range(raw.num_experts)]


def ean(raw: RawLayer) -> Vector:
    width = len(raw.tokens[0].visits[0].output)
    return [
        math.fsum(norm([output[j] for output in raw.outputs(p)]) for j in range(width)) for p in range(raw.num_experts)
    ]


def egs(raw: RawLayer) -> Vector:
    cosines = gradient_stats(raw)["gradient_cosine_EE"]
    return [math.fsum(row) - row[p] for p, row in enumerate(cosines)]


def ege(raw: RawLayer) -> Vector:
    """A std of 0 counts as 1e-30."""
    return [
        math.fsum(
            math.log(max(standard_deviation(column), 1e-30)) for matrix in matrices for column in matrix.T.tolist()
        )
        for matrices in raw.gradients
    ]


def ego(raw: RawLayer) -> Vector:
    return [
        float(sum(outliers(neuron) for matrix in matrices for neuron in matrix.tolist())) for matrices in raw.gradients
    ]


def egn(raw: RawLayer) -> Vector:
    return [
        math.fsum(norm(column) for matrix in matrices for column in matrix.T.tolist()) for matrices in raw.gradients
    ]


def _gated_norms(raw: RawLayer, expert: int) -> Vector:
    return [
        visit.weight / math.fsum(other.weight for other in token.visits) * norm(visit.output)
        for token in raw.tokens
        for visit in token.visits
        if visit.expert == expert
    ]


def reap(raw: RawLayer) -> Vector:
    return [mean(_gated_norms(raw, p)) for p in range(raw.num_experts)]


def reap_sum(raw: RawLayer) -> Vector:
    return [math.fsum(_gated_norms(raw, p)) for p in range(raw.num_experts)]


def man(raw: RawLayer) -> Vector:
    return [mean([norm(output) for output in raw.outputs(p)]) for p in range(raw.num_experts)]


def msan(raw: RawLayer) -> Vector:
    return [mean([norm(output) ** 2 for output in raw.outputs(p)]) for p in range(raw.num_experts)]


def seer(raw: RawLayer) -> Vector:
    return [
        math.fsum(token.probabilities[p] for token in raw.tokens if p in raw.chosen(token))
        for p in range(raw.num_experts)
    ]


def trimming(raw: RawLayer) -> Vector:
    return [mean([token.probabilities[p] for token in raw.tokens]) for p in range(raw.num_experts)]


def ecc(raw: RawLayer) -> list[Vector]:
    experts = range(raw.num_experts)
    return [[float(sum({p, q} <= set(raw.chosen(token)) for token in raw.tokens)) for q in experts] for p in experts]


def ets(raw: RawLayer) -> list[Vector]:
    experts = range(raw.num_experts)
    return [[float(len(raw.token_ids(p) & raw.token_ids(q))) for q in experts] for p in experts]


MEASURES = {
    "ews": ews,
    "rwn": rwn,
    "wsr": wsr,
    "ewn": ewn,
    "euf": euf,
    "evc": evc,
    "eas": eas,
    "eae": eae,
    "eao": eao,
    "ean": ean,
    "egs": egs,
    "ege": ege,
    "ego": ego,
    "egn": egn,
    "reap": reap,
    "reap-sum": reap_sum,
    "man": man,
    "msan": msan,
    "seer": seer,
    "trimming": trimming,
}
"""A number per expert."""

PAIR_MEASURES = {"ecc": ecc, "ets": ets}
"""A number per pair of experts."""


def drop_turns(pairs: Sequence[Sequence[float]], counts: Sequence[float], direction: str) -> list[int]:
    """The turn at which each expert goes: of the pair at the extreme, the one less used; the last one never goes.

    Ties: the first pair in reading order; of two used alike, the second.
    """
    left = list(range(len(counts)))
    turns = [len(counts) - 1] * len(counts)
    for turn in range(len(counts) - 1):
        candidates = [(pairs[p][q], p, q) for p in left for q in left if p < q]
        extreme = (max if direction == "max" else min)(value for value, _, _ in candidates)
        p, q = next((p, q) for value, p, q in candidates if value == extreme)
        dropped = p if counts[p] < counts[q] else q
        turns[dropped] = turn
        left.remove(dropped)
    return turns


# --------------------------------------------------------------------------------------------- the loss


def load_balance(
    layers: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[int]]]], counted: Sequence[bool]
) -> float:
    """Mean over layers of ``E sum_i f_i P_i`` (Switch Transformer, eq. 4-6), from logits and chosen ids."""
    losses = []
    for logits, chosen in layers:
        num_experts = len(logits[0])
        kept = [t for t, count in enumerate(counted) if count]
        assignments = [expert for t in kept for expert in chosen[t]]
        loss = 0.0
        for expert in range(num_experts):
            share = assignments.count(expert) / len(assignments)
            loss += share * mean([softmax(logits[t])[expert] for t in kept])
        losses.append(num_experts * loss)
    return mean(losses)


def mean_experts(experts: nn.Module, weights: dict[int, float]) -> dict[str, Tensor]:
    """The weighted mean of some experts, tensor by tensor, in float64; ids and weights as a plan has them."""
    return {
        name: torch.stack([weight * stack.detach()[expert].double() for expert, weight in weights.items()]).sum(0)
        for name, stack in experts.named_parameters(recurse=False)
    }


def merge_groups(kept: Sequence[int], alike: Sequence[Sequence[float]]) -> dict[int, dict[int, float]]:
    """Of one layer, expert by expert: who joins whom, and with what weight (DiEP, App. A.5)."""
    groups: dict[int, dict[int, float]] = {}
    for expert in range(len(alike)):
        if expert in kept:
            continue
        best = kept[0]
        for other in kept:
            if alike[other][expert] > alike[best][expert]:
                best = other
        groups.setdefault(best, {best: math.exp(1.0)})[expert] = math.exp(alike[best][expert])
    for group in groups.values():
        total = sum(group.values())
        for expert in group:
            group[expert] /= total
    return groups


def usage_weights(groups: Mapping[int, Sequence[int]], used: Sequence[float]) -> dict[int, dict[int, float]]:
    """Groups of more than one expert, by the one that is kept, with the share of the use of each."""
    return {
        kept: {expert: used[expert] / sum(used[i] for i in group) for expert in sorted(group)}
        for kept, group in groups.items()
        if len(group) > 1
    }


def dominant_groups(
    kept: Sequence[int], logits: Sequence[Vector], used: Sequence[float]
) -> dict[int, dict[int, float]]:
    """M-SMoE's groups of one layer, from the logits of every token: ``logits[t][expert]``."""
    columns = list(zip(*logits, strict=True))
    groups = {expert: [expert] for expert in kept}
    for expert in range(len(columns)):
        if expert not in kept:
            alike = {
                other: dot(columns[expert], columns[other]) / norm(columns[expert]) / norm(columns[other])
                for other in kept
            }
            groups[max(kept, key=alike.__getitem__)].append(expert)
    return usage_weights(groups, used)


def clusters(unlike: Sequence[Sequence[float]], count: int, within: int) -> list[set[int]]:
    """``count`` clusters in each run of ``within`` experts, by average linkage over all pairs, each time anew."""
    found = []
    for first in range(0, len(unlike), within):
        groups = [{expert} for expert in range(first, first + within)]
        while len(groups) > count:
            one, other = min(
                combinations(groups, 2), key=lambda pair: mean([unlike[i][j] for i in pair[0] for j in pair[1]])
            )
            groups = [group for group in groups if group not in (one, other)] + [one | other]
        found += groups
    return found


def permuted_neurons(experts: nn.Module, expert: int, order: Sequence[int]) -> None:
    """Put the neurons of one expert in another order, neuron by neuron: the same function of its input."""
    width, before = len(order), {name: stack.detach().clone() for name, stack in experts.named_parameters()}
    for name, stack in experts.named_parameters():
        new, old = stack.data[expert], before[name][expert]
        if name.endswith("bias"):  # a vector is a matrix of one column
            new, old = new[:, None], old[:, None]
        elif experts.is_transposed != name.startswith("down"):
            new, old = new.T, old.T
        if name == "down_proj_bias":
            continue
        for place, neuron in enumerate(order):
            if not name.startswith("gate_up"):
                new[place] = old[neuron]
            elif experts.is_concatenated:
                new[place], new[width + place] = old[neuron], old[width + neuron]
            else:
                new[2 * place], new[2 * place + 1] = old[2 * neuron], old[2 * neuron + 1]
