"""Gradient figures equal a slow reference, whatever fits into memory at once, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe.criteria import criteria
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import UNPACK, find_moe_layers
from lightning_moe.moe.non_uniform import keep_in_block
from lightning_moe.moe.routing import mask_plan
from lightning_moe.moe.sharded_loading import load_sharded
from lightning_moe.moe.sharding import Sharding
from lightning_moe.moe.split_tensors import is_split, whole
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.search.in_memory import gradient_figures
from lightning_moe.stats import gradients
from lightning_moe.stats.gradients import GradientSums, chunks_of, layer_chunks, sum_bytes, trade, with_gradients
from lightning_moe.stats.layer_stats import GRADIENTS, LayerStats
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.store import ModelStats, load_stats
from tests.helpers.families import FAMILIES, NUM_EXPERTS, tiny_batch, tiny_model
from tests.helpers.plans import non_uniform_plan
from tests.helpers.reference import gradients as reference
from tests.helpers.sharded import on_ranks, written

Figures = dict[str, dict[str, Tensor]]
Batch = Tensor | tuple[Tensor, Tensor]

FEW = ["mixtral", "deepseek_v3", "gpt_oss"]
KIB = 1 / (1 << 20)
"""In GiB."""


def add(sums: GradientSums, model: PreTrainedModel, batches: Iterable[Batch]) -> None:
    """The loop that everybody would write."""
    for batch in batches:
        ids, mask = batch if isinstance(batch, tuple) else (batch, torch.ones_like(batch))
        logits = model(input_ids=ids, attention_mask=mask).logits
        counted = mask[:, 1:] * mask[:, :-1]
        loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
        sums.backward((loss * counted).sum())


def figures_of(model: PreTrainedModel, batches: Iterable[Batch], gibibytes: float = 8.0) -> Figures:
    found: Figures = {}
    for chunk in layer_chunks(find_moe_layers(model), gibibytes):
        sums = GradientSums(chunk)
        with sums.attached(model):
            add(sums, model, batches)
        found |= sums.figures()
    return found


def assert_figures(found: dict[str, Tensor], expected: dict[str, Any], tolerance: float, flips: int = 0) -> None:
    """``flips`` are outliers that rounding may carry over the limit, for each expert."""
    assert found.keys() == expected.keys() == set(GRADIENTS)
    for name, value in found.items():
        assert value.dtype == torch.float64
        wanted = torch.as_tensor(expected[name], dtype=torch.float64)
        if name == "gradient_outliers_E":
            assert value.shape == wanted.shape and int((value - wanted).abs().max()) <= flips
            continue
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            value, wanted, rtol=tolerance, atol=tolerance * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


def assert_same(found: Figures, expected: Figures, tolerance: float = 1e-5, flips: int = 0) -> None:
    assert found.keys() == expected.keys()
    for layer in found:
        assert_figures(found[layer], expected[layer], tolerance, flips)


# ----------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_equal_the_reference(family: str) -> None:
    """One window after another, one expert, one neuron at a time; and one layer at a time is the same."""
    model = tiny_model(family)
    windows = [*tiny_batch(2, 12, seed=1), *tiny_batch(1, 12, seed=2)]
    layers = find_moe_layers(model)
    found = figures_of(model, [torch.stack(windows[:2]), windows[2][None]])
    assert_same(figures_of(model, [torch.stack(windows[:2]), windows[2][None]], KIB), found, 1e-9)
    raws = reference.raw_gradients(model, [layer.experts for layer in layers], windows)
    for layer, raw in zip(layers, raws, strict=True):
        assert_figures(found[layer.name], reference.gradient_stats(raw), 2e-5, flips=1)
        assert float(found[layer.name]["gradient_outliers_E"].sum()) > 0


# ------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("family", FEW)
def test_permuting_experts_permutes_figures(family: str) -> None:
    order = [3, 2, 0, 1, 6, 7, 5, 4]  # groups of routers stay together
    model, other = tiny_model(family), tiny_model(family)
    for layer in find_moe_layers(other):
        keep_in_block(layer.parts, order)
    plain, moved = figures_of(model, [tiny_batch()]), figures_of(other, [tiny_batch()])
    for name, one in plain.items():
        expected = {key: value[order][:, order] if key.endswith("EE") else value[order] for key, value in one.items()}
        assert_figures(moved[name], expected, 1e-5, flips=1)


@settings(max_examples=8)
@given(split=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_batches_and_padding_do_not_matter(split: list[int], seed: int) -> None:
    """Windows one by one, or in batches of any size, whose last is filled up with blanks that are not read."""
    model = tiny_model("mixtral")
    windows = tiny_batch(sum(split), 10, seed)
    alone = figures_of(model, [window[None] for window in windows])
    batches: list[Batch] = list(windows[:-1].split([*split[:-1], split[-1] - 1])) if len(windows) > 1 else []
    longer = torch.full((2, 14), 7)
    longer[0, 2:12] = windows[-1]
    mask = torch.zeros_like(longer)
    mask[0, 2:12] = 1
    mask[1, 3] = 1  # a lone token predicts nothing
    batches = [batch for batch in batches if len(batch)] + [(longer, mask)]  # type: ignore[arg-type]
    assert_same(figures_of(model, batches), alone, flips=2)


def test_masked_experts_have_no_figures() -> None:
    """As if they had been cut."""
    model, cut = tiny_model("mixtral"), tiny_model("mixtral")
    plan = non_uniform_plan(model)
    keep_experts(cut, plan)
    expected = figures_of(cut, [tiny_batch()])
    with mask_plan(find_moe_layers(model), plan):
        assert_same(figures_of(model, [tiny_batch()]), expected, flips=1)


def stats_with(model: PreTrainedModel, figures: Figures) -> list[LayerStats]:
    return with_gradients(Observation(model).compute(), figures)


def test_an_expert_without_tokens_has_no_gradient() -> None:
    """It goes first by the entropy and the norm of gradients; and every score is a number."""
    model = tiny_model("mixtral")
    for stats in stats_with(model, figures_of(model, [tiny_batch(1, 3)])):  # three tokens reach six experts at most
        assert stats.gradient_norm_E is not None and stats.gradient_cosine_EE is not None
        silent = (stats.gradient_norm_E == 0).nonzero().flatten().tolist()
        assert len(silent) >= 2
        assert not stats.gradient_cosine_EE[silent].any()
        for criterion in (one for one in criteria() if one.gradients):
            for direction in ("min", "max"):
                assert bool(criterion.scores(stats, direction).isfinite().all())  # type: ignore[arg-type]
            if criterion.name in ("ege", "egn"):
                assert set(criterion.scores(stats).topk(len(silent), largest=False).indices.tolist()) == set(silent)


# ------------------------------------------------------------------------------------------------- types


def test_sums_of_16_bit_weights_are_float32() -> None:
    """Each batch's gradient has the type of the weights; their sum does not lose what is small beside it."""
    model = tiny_model("mixtral").to(torch.bfloat16)
    batches = [tiny_batch(2, 12, seed) for seed in range(6)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = find_moe_layers(model)[0]
    sums = GradientSums([layer])
    with sums.attached(model):
        add(sums, model, batches)
    (name, held), *_ = ((key[1], value) for key, value in sums._sums.items())
    stack = getattr(layer.experts, name)
    exact, rounded = torch.zeros(stack.shape, dtype=torch.float64), torch.zeros_like(stack)
    for batch in batches:
        model.zero_grad()
        logits = model(batch).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        exact += stack.grad.double()
        rounded += stack.grad
    assert held.dtype == torch.float32
    torch.testing.assert_close(held.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
    assert float((rounded.double() - exact).norm()) > 1e-4 * float(exact.norm())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_takes_no_copies_made_without_gradients() -> None:
    """As in one pass after the other inside the context of a Trainer's precision."""
    model = tiny_model("mixtral")
    plain = figures_of(model, [tiny_batch()])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(tiny_batch())
        mixed = figures_of(model, [tiny_batch(), tiny_batch()])
    for name, one in plain.items():
        assert bool((mixed[name]["gradient_norm_E"] > 0).eq(one["gradient_norm_E"] > 0).all())
        torch.testing.assert_close(
            mixed[name]["gradient_norm_E"],
            2 * one["gradient_norm_E"],
            rtol=0.2,
            atol=float(one["gradient_norm_E"].max()) / 20,
        )


# --------------------------------------------------------------------------------------------- the guest


def test_the_model_is_left_as_it_was() -> None:
    """Weights, what learns, gradients that somebody is gathering, modes and hooks; also when it fails inside."""
    model = tiny_model("qwen2_moe").train()
    model.get_input_embeddings().requires_grad_(False)
    model.lm_head.eval()
    given_gradient = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = given_gradient
    stack = find_moe_layers(model)[0].experts.down_proj
    stack.grad = torch.full_like(stack, 2.0)

    def state() -> list[Any]:
        parameters = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
        hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
        return [parameters, [bool(h) for h in hooks], [module.training for module in model.modules()]]

    before, weights = state(), {name: value.clone() for name, value in model.state_dict().items()}
    first = figures_of(model, [tiny_batch()])
    sums = GradientSums(find_moe_layers(model))
    with pytest.raises(RuntimeError, match="stopped"), sums.attached(model):
        add(sums, model, [tiny_batch()])
        raise RuntimeError("stopped")
    assert state() == before and model.lm_head.weight.grad is given_gradient
    assert bool((stack.grad == 2.0).all())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert_same(figures_of(model, [tiny_batch()]), first, 1e-9)


def test_only_the_layers_asked_for_take_gradients() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    sums = GradientSums(layers[1:])
    with sums.attached(model):
        learn = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert learn and all(name.startswith(layers[1].name) and "_proj" in name for name in learn)
        add(sums, model, [tiny_batch()])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert list(sums.figures()) == [layers[1].name] and not sums._sums


def test_activations_are_recomputed_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode too, in which transformers would not."""
    model = tiny_model("mixtral")
    plain = figures_of(model, [tiny_batch()])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    experts = find_moe_layers(model)[0].experts
    experts.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(figures_of(model, [tiny_batch()]), plain, 1e-6)
    assert len(calls) == 2 and not model.training


# -------------------------------------------------------------------------------------------- the chunks


@settings(max_examples=20)
@given(kibibytes=st.integers(1, 200))
def test_chunks_are_all_layers_in_order_and_fit(kibibytes: int) -> None:
    """A layer takes 36 KiB here; one there must be."""
    layers = find_moe_layers(tiny_model("mixtral", num_hidden_layers=3, intermediate_size=12))
    sizes = sum_bytes(layers)
    assert sizes == [NUM_EXPERTS * 3 * 32 * 12 * 4] * 3
    chunks = layer_chunks(layers, kibibytes * KIB)
    assert [layer.name for chunk in chunks for layer in chunk] == [layer.name for layer in layers]
    assert all(len(chunk) == 1 or len(chunk) * sizes[0] <= kibibytes * 1024 for chunk in chunks)
    assert len(chunks) == -(-3 // max(1, kibibytes * 1024 // sizes[0]))
    assert chunks_of(sizes, kibibytes * KIB) == [[layers.index(layer) for layer in chunk] for chunk in chunks]
    said = trade([sum_bytes(chunk) for chunk in chunks], kibibytes * KIB)
    assert (
        "\n" not in said
        and f"{len(chunks)} pass" in said
        and f"holding {max(map(len, chunks)) * 36 / 1024:.3g} MiB" in said
    )


# ------------------------------------------------------------------------------------------------ errors


def test_gradients_that_are_not_finite_are_refused() -> None:
    model = tiny_model("mixtral")
    layer = find_moe_layers(model)[1]
    sums = GradientSums([layer])
    with sums.attached(model):
        add(sums, model, [tiny_batch()])
    sums._sums[layer.name, "down_proj"][5, 3, 4] = torch.inf
    with pytest.raises(InputError) as refusal:
        sums.figures()
    assert layer.name in str(refusal.value) and "[5]" in str(refusal.value) and "\n" not in str(refusal.value)


def test_packed_experts_are_refused() -> None:
    layers = find_moe_layers(tiny_model("mixtral"))
    vars(layers[1].experts)[UNPACK] = {}
    with pytest.raises(InputError, match=r"packed experts .* have no gradients; leave quantize out"):
        GradientSums(layers)


# ------------------------------------------------------------------------------------------------- store


def test_statistics_come_back_with_and_without_gradients(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    bare = ModelStats("tiny@0123", "data@4567", Observation(model).compute())
    full = ModelStats("tiny@0123", "data@4567", with_gradients(bare.layers, figures_of(model, [tiny_batch()])))
    for stats in (bare, full):
        stats.save(tmp_path / "stats.safetensors")
        loaded = load_stats(tmp_path / "stats.safetensors")
        assert loaded.has_gradients == stats.has_gradients == (stats is full)
        for found, expected in zip(loaded.layers, stats.layers, strict=True):
            for name in GRADIENTS:
                value = getattr(expected, name)
                assert getattr(found, name) is None if value is None else torch.equal(getattr(found, name), value)
    few = full.layers[0].only([1, 6])
    assert few.gradient_cosine_EE is not None and full.layers[0].gradient_cosine_EE is not None
    assert torch.equal(few.gradient_cosine_EE, full.layers[0].gradient_cosine_EE[[1, 6]][:, [1, 6]])
    assert not bare.layers[0].only([1, 6]).has_gradients


# ------------------------------------------------------------------------------------------------- ranks

TEXT = [{"input_ids": tiny_batch(2, 12, seed)} for seed in range(3)]
"""An odd number: one of two ranks has nothing left at the end."""

SPLIT = ("mixtral", "gpt_oss")


def on_each_rank(folder: Path, sharding: Sharding) -> None:
    """Split, with one layer at a time; and as a whole on both. One stack is gathered at a time, and sums stay split."""
    gathered: list[int] = []

    def counting(tensor: Tensor) -> Tensor:
        gathered.append(tensor.numel())
        return whole(tensor)

    gradients.whole = counting
    for family in SPLIT:
        gathered.clear()
        split = load_sharded(str(written(family, folder)), sharding)
        found = {"split": gradient_figures(split, TEXT, KIB)}
        assert len(gathered) == 4 and max(gathered) == max(p.numel() for p in split.parameters() if p.dim() == 3)
        found["whole"] = gradient_figures(tiny_model(family), TEXT, 8.0)
        assert len(gathered) == 4
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{family}.pt")
        sums = GradientSums(find_moe_layers(split))
        with sums.attached(split):
            add(sums, split, [TEXT[0]["input_ids"]])
        assert all(is_split(held) for held in sums._sums.values())
        assert all(p.requires_grad and p.grad is None for p in split.parameters() if is_split(p))


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, on_each_rank)
    for family in SPLIT:
        expected = gradient_figures(tiny_model(family), TEXT, 8.0)
        for found in torch.load(tmp_path / f"{family}.pt").values():
            assert_same(found, expected, 2e-5, flips=1)
