"""Adaptive skipping: the rule equals a slow reference, skips nothing by default, and travels with the checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe.errors import InputError
from lightning_moe.moe import skip_tables, skipping
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.experts import ExpertHooks, expert_hooks
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import (
    SkipTable,
    config_entry,
    count_only,
    reset_skipped,
    set_skipping,
    skipped,
    stored_entry,
    switch_skipping,
)
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.stats.observation import Observation
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import fewest_plan, non_uniform_plan, uniform_plan
from tests.helpers.reference import stock_experts as reference
from tests.helpers.without_us import run_without_us

FOUR = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"]
ALL_THREE: dict[str, Any] = {"num_experts_per_tok": 3, "moe_k": 3, "moe_topk": 3}
"""Three experts per token, under any name; Phimoe knows two only."""


def tables_of(model: PreTrainedModel, gamma1: float = 0.7, seed: int = 0) -> dict[int, SkipTable]:
    """Symmetric tables around 1, with pairs whose threshold is above 1."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for layer in find_moe_layers(model):
        half = torch.rand(layer.num_experts, layer.num_experts, generator=generator)
        tables[layer.parts.index] = SkipTable(gamma1, (half + half.T).round(decimals=4))
    return tables


def tiny(family: str) -> PreTrainedModel:
    return tiny_model(family, **({} if family == "phimoe" else ALL_THREE))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model.eval()(tiny_batch()).logits


class Slowly:
    """Takes the place of every experts module: one token, one expert at a time, written from the papers."""

    def __init__(self, model: PreTrainedModel, tables: dict[int, SkipTable], rule: str) -> None:
        self.skipped = self.seen = 0
        for layer in find_moe_layers(model):
            table = tables[layer.parts.index]

            def forward(
                hidden: Tensor, ids: Tensor, weights: Tensor, experts: Any = layer.experts, table: Any = table
            ) -> Tensor:
                rows = [self._token(experts, table, rule, *row) for row in zip(hidden, ids, weights, strict=True)]
                return torch.stack(rows)

            layer.experts.forward = forward

    def _token(self, experts: Any, table: SkipTable, rule: str, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        chosen = list(zip(ids.tolist(), weights.tolist(), strict=True))
        first, largest = max(chosen, key=lambda pair: pair[1])
        stay = []
        for expert, weight in chosen:
            gamma2 = 1.0 if rule == "naee" else float(table.gamma2_EE[first, expert])
            if expert == first or not weight < table.gamma1 * gamma2 * largest:
                stay.append((expert, weight))
        self.skipped += len(chosen) - len(stay)
        self.seen += len(chosen)
        scale = sum(weight for _, weight in chosen) / sum(weight for _, weight in stay)
        output = torch.zeros_like(hidden)
        for expert, weight in stay:
            output = output + scale * weight * reference.run_alone(experts, expert, hidden[None])[0]
        return output


@pytest.mark.parametrize("rule", ["diep", "naee"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_equals_a_slow_reference(family: str, rule: Literal["diep", "naee"]) -> None:
    model = tiny(family)
    tables = tables_of(model)
    slow_model = copy.deepcopy(model)
    slow = Slowly(slow_model, tables, rule)
    expected = logits_of(slow_model)
    set_skipping(model, tables, rule)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    counts = skipped(model).values()
    assert (sum(one for one, _ in counts), sum(all_ for _, all_ in counts)) == (slow.skipped, slow.seen)
    assert 0 < slow.skipped < slow.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_gamma1_of_zero_skips_nothing(family: str) -> None:
    model = tiny(family)
    expected = logits_of(model)
    with expert_hooks(model, find_moe_layers(model), {}):
        same_function = logits_of(model)
    set_skipping(model, tables_of(model, gamma1=0.0))
    assert torch.equal(logits_of(model), same_function)
    torch.testing.assert_close(same_function, expected, atol=1e-5, rtol=1e-5)
    assert all(one == 0 and total > 0 for one, total in skipped(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_experts_are_not_computed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    stock = skipping._outputs

    def counting(experts: Any, inputs: Tensor, *rest: Any) -> Tensor:
        rows.append(inputs.shape[0])
        return stock(experts, inputs, *rest)

    monkeypatch.setattr(skipping, "_outputs", counting)
    model = tiny(family)
    set_skipping(model, tables_of(model))
    logits_of(model)
    assert rows == [seen - left_out for left_out, seen in skipped(model).values()]


def test_one_expert_per_token_has_nothing_to_skip() -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1)
    set_skipping(model, tables_of(model, gamma1=0.0))
    expected = logits_of(model)
    set_skipping(model, tables_of(model, gamma1=9.0))
    assert torch.equal(logits_of(model), expected)
    assert all(one == 0 for one, _ in skipped(model).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_skip(dtype: torch.dtype) -> None:
    model = tiny("qwen2_moe").to(dtype)
    set_skipping(model, tables_of(model))
    assert bool(logits_of(model).isfinite().all())
    assert all(0 < one < total for one, total in skipped(model).values())


def test_a_model_that_skips_can_train() -> None:
    """Gradients equal those of the slow reference's weights: of the experts, of the router, of what lies below."""
    model = tiny("qwen2_moe")
    tables = tables_of(model)
    set_skipping(model, tables)
    model(tiny_batch(), labels=tiny_batch()).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkey = skipping.compute_rows
    # Everything is computed and skipped experts get weight 0: another path to the same gradients.
    try:
        skipping.compute_rows = lambda experts, hidden, ids, keep=None: monkey(experts, hidden, ids)
        model(tiny_batch(), labels=tiny_batch()).loss.backward()
    finally:
        skipping.compute_rows = monkey
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert any("gate.weight" in name and bool(gradient.abs().sum() > 0) for name, gradient in found.items())


# ------------------------------------------------------------------------------------- on, off, and guests


def test_on_and_off() -> None:
    model = tiny("mixtral")
    plain = logits_of(model)
    with pytest.raises(InputError, match="no skip tables"):
        switch_skipping(model, True)
    switch_skipping(model, False)
    set_skipping(model, tables_of(model), active=False)
    assert torch.equal(logits_of(model), plain) and skipped(model) == {}
    logits = {}
    for turn in (True, "naee"):
        switch_skipping(model, turn)
        logits[turn] = logits_of(model)
    assert not torch.equal(logits[True], logits["naee"]) and not torch.equal(logits[True], plain)
    reset_skipped(model)
    assert all(counts == (0, 0) for counts in skipped(model).values())
    switch_skipping(model, False)
    assert torch.equal(logits_of(model), plain)
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_masked_tokens_are_not_counted() -> None:
    model = tiny("mixtral")
    set_skipping(model, tables_of(model))
    logits_of(model)
    whole = skipped(model)
    halves = []
    for mask in (torch.tensor([[1], [0]]), torch.tensor([[0], [1]])):
        reset_skipped(model)
        count_only(model, mask.expand(2, 24))
        logits_of(model)
        halves.append(skipped(model))
    for name, (one, total) in whole.items():
        assert sum(half[name][0] for half in halves) == one
        assert [half[name][1] for half in halves] == [total // 2] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_a_model_that_skips(family: str) -> None:
    """A guest changes no logit, and sees every expert that the router chose."""
    model = tiny(family)
    set_skipping(model, tables_of(model))
    expected = logits_of(model)
    observation = Observation(model)
    observation.next_batch(tiny_batch())
    with observation.attached(model):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits_of(model), expected)
    first, plain = observation.compute()[0], Observation(model)
    switch_skipping(model, False)
    plain.next_batch(tiny_batch())
    with plain.attached(model):
        logits_of(model)
    for name in ("count_E", "norm_E", "gated_norm_E", "hsic_EE"):  # of the first layer, whose inputs are the same
        torch.testing.assert_close(getattr(first, name), getattr(plain.compute()[0], name), msg=name)


def test_gates_work_on_what_skipping_left() -> None:
    model = tiny("mixtral")
    layers = find_moe_layers(model)
    set_skipping(model, tables_of(model))
    expected = logits_of(model)
    ones = {layer.name: ExpertHooks(gates_E=torch.ones(8)) for layer in layers}
    with expert_hooks(model, layers, ones):
        assert torch.equal(logits_of(model), expected)
    # A gate of 0 on all but one expert: the output is that expert's, by its renormalised weight.
    gates_E = torch.zeros(8)
    gates_E[3] = 1.0
    hidden_TH = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), expert_hooks(model, layers, {layers[0].name: ExpertHooks(gates_E=gates_E)}):
        _, weights_TK, ids_TK = layers[0].router(hidden_TH)
        found_TH = layers[0].experts(hidden_TH, ids_TK, weights_TK)
        _, kept_TK = skipping.choose(layers[0].experts, ids_TK, weights_TK)
        share_T = (kept_TK * (ids_TK == 3)).sum(-1)
        torch.testing.assert_close(found_TH, share_T[:, None] * reference.run_alone(layers[0].experts, 3, hidden_TH))


# ------------------------------------------------------------------------------------------- surgery, disk


@pytest.mark.parametrize("plan", [uniform_plan, non_uniform_plan, fewest_plan])
@pytest.mark.parametrize("family", FOUR)
def test_tables_are_cut_with_the_experts(family: str, plan: Any, tmp_path: Path) -> None:
    """In memory and on disk alike; a pruned model skips as the full one does by its kept experts."""
    model = tiny_model(family)
    tables, keep = tables_of(model), plan(model)
    save_model(model, tmp_path / "full")
    set_skipping(model, tables)
    save_model(model, tmp_path / "with-tables")
    keep_experts(model, keep)
    entry = stored_entry(model.config)
    assert entry is not None
    for layer in find_moe_layers(model):
        found = torch.tensor(entry["layers"][str(layer.parts.index)]["gamma2"])
        ids = keep[layer.name]
        torch.testing.assert_close(found, tables[layer.parts.index].gamma2_EE[ids][:, ids])
    expected = logits_of(model)
    counts = skipped(model)
    assert sum(one for one, _ in counts.values()) > 0
    compact_checkpoint(str(tmp_path / "with-tables"), keep, tmp_path / "cut")
    given = config_entry(tables, active=True)
    compact_checkpoint(str(tmp_path / "full"), keep, tmp_path / "given", skipping=given)
    save_model(model, tmp_path / "saved")
    for folder in ("cut", "given", "saved"):
        loaded = copy.deepcopy(load_model(str(tmp_path / folder)))
        assert stored_entry(loaded.config) == entry
        assert torch.equal(logits_of(loaded), expected)
        assert skipped(loaded) == counts


def test_inactive_tables_leave_a_stock_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    set_skipping(model, tables_of(model))
    save_model(model, tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").glob("*.py")} == {
        "modeling_non_uniform_moe.py",
        "expert_skipping.py",
    }
    switch_skipping(model, False)
    plain = logits_of(model)
    save_model(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "auto_map" not in config and not config["expert_skipping"]["active"]
    assert not list((tmp_path / "model").glob("*.py"))
    loaded = copy.deepcopy(load_model(str(tmp_path / "model")))
    assert torch.equal(logits_of(loaded), plain)
    switch_skipping(loaded, True)
    switch_skipping(model, True)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 9}, "version 9"),
        ({"rule": "other"}, "diep or naee"),
        ({"layers": {"0": {"gamma1": 0.5}}}, "gamma2"),
        ({"layers": {"0": {"gamma1": 0.5, "gamma2": [[1.0, 1.0], [1.0, 1.0]]}}}, "8 experts"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.config.expert_skipping = config_entry(tables_of(model)) | change
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=told) as refusal:
        load_model(str(tmp_path))
    assert "\n" not in str(refusal.value)


WITHOUT_US = """
import copy, json, sys
from pathlib import Path


class NoLightningMoE:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning_moe":
            raise ImportError("lightning_moe is not installed here")


sys.meta_path.insert(0, NoLightningMoE())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
input_ids = load_file(root / "input_ids.safetensors")["input_ids"]
logits, counts = {}, {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file()):
    for trust in (False, True):
        if not trust and folder.name.endswith("non_uniform"):
            continue
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=trust or None
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
        model = copy.deepcopy(model).eval()  # out of the mapped file, where products round otherwise
        with torch.no_grad():
            logits[f"{folder.name} {trust}"] = model(input_ids).logits
        rules = [module.expert_skipping for module in model.modules() if hasattr(module, "expert_skipping")]
        counts[f"{folder.name} {trust}"] = [[rule.skipped, rule.seen] for rule in rules]
save_file(logits, root / "logits.safetensors")
(root / "counts.json").write_text(json.dumps(counts))
"""


def test_checkpoints_skip_where_lightning_moe_is_not_installed(tmp_path: Path) -> None:
    """With ``trust_remote_code=True`` they skip; without, a uniform one loads in stock transformers and does not."""
    root, expected, counts = tmp_path / "models", {}, {}
    for family in FAMILIES:
        for kind, plan in (("uniform", uniform_plan), ("non_uniform", non_uniform_plan)):
            model = tiny_model(family)
            set_skipping(model, tables_of(model), "naee" if family == "olmoe" else "diep")
            keep_experts(model, plan(model))
            save_model(model, root / f"{family}-{kind}")
            expected[f"{family}-{kind} True"] = logits_of(model)
            counts[f"{family}-{kind} True"] = [list(count) for count in skipped(model).values()]
            ours = copy.deepcopy(AutoModelForCausalLM.from_pretrained(root / f"{family}-{kind}"))
            assert torch.equal(logits_of(ours), logits_of(model))
            if kind == "uniform":
                switch_skipping(model, False)
                expected[f"{family}-{kind} False"] = logits_of(model)
                counts[f"{family}-{kind} False"] = []
    save_file({"input_ids": tiny_batch()}, root / "input_ids.safetensors")
    run_without_us(WITHOUT_US, root, tmp_path)
    assert json.loads((root / "counts.json").read_text()) == counts
    found = load_file(root / "logits.safetensors")
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), name


def test_a_skipping_model_of_remote_code_is_saved_as_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model("mixtral")
    set_skipping(model, tables_of(model))
    save_model(model, tmp_path / "first")
    remote = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True))
    assert torch.equal(logits_of(remote), logits_of(model))
    save_model(remote, tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "again"))
    assert first == again and first["architectures"] == ["MixtralForCausalLM"]
    layers = find_moe_layers(remote)
    with expert_hooks(remote, layers, {layers[0].name: ExpertHooks(gates_E=torch.zeros(8))}):
        assert not torch.equal(logits_of(remote), logits_of(model))
    switch_skipping(remote, False)
    switch_skipping(model, False)
    assert torch.equal(logits_of(remote), logits_of(model))


def test_only_what_travels_needs_nothing_of_ours() -> None:
    code = Path(skipping.__file__).read_text()
    assert "from lightning_moe" not in code and "import lightning_moe" not in code
    assert skip_tables.DIGITS == 4
