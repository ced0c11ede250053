"""Skip tables: they are cut with the experts, and travel with the checkpoint, with us and without."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_moe.errors import InputError
from lightning_moe.moe import skip_tables, skipping
from lightning_moe.moe.checkpoints import load_model, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.experts import ExpertHooks, expert_hooks
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.skip_tables import config_entry, set_skipping, skipped, stored_entry, switch_skipping
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import fewest_plan, non_uniform_plan, uniform_plan
from tests.helpers.without_us import run_without_us
from tests.moe.pruned_models import logits_of
from tests.moe.skip_thresholds import tables_of

FOUR = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"]


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
