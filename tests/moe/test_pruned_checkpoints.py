"""The laws of pruned checkpoints: they load with the same logits, with us and without, and can be pruned again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lightning_moe
from lightning_moe.moe.checkpoints import layer_shapes, save_model
from lightning_moe.moe.compaction import compact_checkpoint
from lightning_moe.moe.layers import find_moe_layers
from lightning_moe.moe.surgery import keep_experts
from tests.helpers.families import FAMILIES, tiny_batch, tiny_model
from tests.helpers.plans import Keep, non_uniform_plan, uniform_plan
from tests.helpers.without_us import run_without_us
from tests.moe.pruned_models import (
    assert_identical,
    assert_stock,
    every_family,
    every_plan,
    in_memory,
    logits_of,
    pruned,
    read_config,
    snapshot,
    stock_load,
)


@every_family
@every_plan
def test_a_saved_model_gives_the_same_logits(
    family: str, plan: Callable[[PreTrainedModel], Keep], tmp_path: Path
) -> None:
    """Through ``AutoModelForCausalLM``; non-uniform ones because lightning_moe is imported."""
    assert lightning_moe.__version__
    model = pruned(tiny_model(family), plan(tiny_model(family)))
    save_model(model, tmp_path / "saved")
    counts = {layer.num_experts for layer in find_moe_layers(model)}
    if len(counts) == 1:
        assert_stock(tmp_path / "saved", counts.pop())
    loaded = stock_load(tmp_path / "saved")
    assert_identical(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert layer_shapes(str(tmp_path / "saved")) == [layer.shape for layer in find_moe_layers(model)]


@every_family
def test_a_pruned_checkpoint_can_be_pruned_again(family: str, tmp_path: Path) -> None:
    """From non-uniform to uniform, which leaves a stock checkpoint, and to non-uniform once more."""
    model = tiny_model(family)
    first = non_uniform_plan(model)
    keep_experts(model, first)
    save_model(model, tmp_path / "first")
    assert (tmp_path / "first" / "modeling_non_uniform_moe.py").is_file()
    names = list(first)
    uniform = {names[1]: [0, 1, 4, 5]}
    other = {names[0]: [0, 1, 2, 3], names[1]: [0, 2, 3, 5]} if family == "deepseek_v3" else {names[0]: [0, 2]}
    for turn, second in enumerate((uniform, other)):
        again = pruned(stock_load(tmp_path / "first"), second)
        assert_identical(again.state_dict(), pruned(model, second).state_dict())
        save_model(again, tmp_path / f"memory-{turn}")
        compact_checkpoint(str(tmp_path / "first"), second, tmp_path / f"disk-{turn}")
        for folder in (tmp_path / f"memory-{turn}", tmp_path / f"disk-{turn}"):
            assert torch.equal(logits_of(stock_load(folder)), logits_of(again))
            if turn == 0:
                assert_stock(folder, 4)
        memory, disk = (read_config(tmp_path / f"{place}-{turn}") for place in ("memory", "disk"))
        assert memory == disk


WITHOUT_US = """
import copy, sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
input_ids = load_file(root / "input_ids.safetensors")["input_ids"]
logits = {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file()):
    trust = {"trust_remote_code": True} if folder.name.endswith("non_uniform") else {}
    if trust:
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), (folder, error)
        else:
            raise AssertionError(f"{folder} was loaded without its code")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
    model = copy.deepcopy(model).eval()  # out of the mapped file, where products round otherwise
    with torch.no_grad():
        logits[folder.name] = model(input_ids).logits
        logits[folder.name + " generated"] = model.generate(input_ids[:, :4], max_new_tokens=3, do_sample=False)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(input_ids).logits, logits[folder.name], atol=1e-5, rtol=1e-5)
save_file(logits, root / "logits.safetensors")
"""


def test_checkpoints_load_where_lightning_moe_is_not_installed(tmp_path: Path) -> None:
    """Uniform ones with nothing but transformers, non-uniform ones with ``trust_remote_code=True`` alone.

    Without it stock transformers refuses these, and does not make up what is missing.
    """
    root, expected = tmp_path / "models", {}
    for family in FAMILIES:
        for kind, plan in (("uniform", uniform_plan), ("non_uniform", non_uniform_plan)):
            model = tiny_model(family)
            keep_experts(model, plan(model))
            save_model(model, root / f"{family}-{kind}")
            expected[f"{family}-{kind}"] = logits_of(model)
            expected[f"{family}-{kind} generated"] = model.generate(
                tiny_batch()[:, :4], max_new_tokens=3, do_sample=False
            )
    for family in FAMILIES:
        kinds = ["without_a_block-non_uniform"]
        if family in ("gpt_oss", "qwen2_moe"):  # one whose block returns a tuple, one with a shared expert
            kinds += ["without_a_block_and_experts-non_uniform", "without_a_layer"]
        for kind in kinds:
            model = tiny_model(family)
            gone, other = (layer.name for layer in find_moe_layers(model))
            cut = {gone: [], other: [0, 1, 4, 5]} if "experts" in kind else {gone: []}
            keep_experts(model, cut, blocks=[gone] if kind == "without_a_layer" else [])
            save_model(model, root / f"{family}-{kind}")
            expected[f"{family}-{kind}"] = logits_of(model)
            expected[f"{family}-{kind} generated"] = model.generate(
                tiny_batch()[:, :4], max_new_tokens=3, do_sample=False
            )
    save_file({"input_ids": tiny_batch()}, root / "input_ids.safetensors")
    run_without_us(WITHOUT_US, root, tmp_path)
    found = load_file(root / "logits.safetensors")
    assert_identical(found, expected)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_a_model_of_remote_code_can_be_pruned_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by ``trust_remote_code`` its class is another one; what is saved of it must not show that."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(family)
    first = non_uniform_plan(model)
    keep_experts(model, first)
    save_model(model, tmp_path / "first")
    remote = in_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True))
    assert torch.equal(logits_of(remote), logits_of(model))
    save_model(remote, tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "first")
    assert torch.equal(logits_of(stock_load(tmp_path / "again")), logits_of(model))
    keep_experts(remote, {list(first)[1]: [0, 1, 4, 5]})
    save_model(remote, tmp_path / "uniform")
    assert_stock(tmp_path / "uniform", 4)
    assert torch.equal(logits_of(stock_load(tmp_path / "uniform")), logits_of(remote))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_saving_in_another_dtype_is_what_transformers_would_load(family: str, tmp_path: Path) -> None:
    """What a family keeps in float32 (correction biases) stays so."""
    model = tiny_model(family)
    before = snapshot(model)
    save_model(model, tmp_path / "float32")
    save_model(model, tmp_path / "bfloat16", dtype="bfloat16")
    assert_identical(snapshot(model), before)
    found = stock_load(tmp_path / "bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).eval()
    assert_identical(snapshot(found), snapshot(expected))
    assert torch.equal(logits_of(found), logits_of(expected))
