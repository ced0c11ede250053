"""Models and tokenizers that no command can take, each refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.bad_input import LAYER, Cases, Place, assert_refused, run_folder
from tests.helpers.checkpoint import Commands, damaged_copy
from tests.helpers.command_runs import QUIET
from tests.helpers.families import tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without experts."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_only(place: Place, **settings: object) -> Path:
    """A folder whose config names some architecture, beside weights nobody gets to read."""
    folder = place.tmp / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def broken_weights(place: Place) -> Path:
    """The file ends in its middle, as after a copy that was cut off."""
    folder = Path(shutil.copytree(place.model, place.tmp / "cut off"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


def without(place: Place, *names: str) -> Path:
    folder = Path(shutil.copytree(place.model, place.tmp / "without"))
    for name in names:
        (folder / name).unlink()
    return folder


def without_tensor(place: Place, part: str) -> Path:
    folder = Path(shutil.copytree(place.model, place.tmp / "incomplete"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MODELS: Cases = {
    "missing model": (lambda p: p.score("--model.path", p.tmp / "nowhere"), ["nowhere", "no such folder"]),
    "missing model, relative": (lambda p: p.evaluate("--model.path", "./nowhere"), ["./nowhere"]),
    "missing model, prune": (lambda p: p.cut("--model.path", p.tmp / "nowhere"), ["nowhere"]),
    "no such hub id": (lambda p: p.score("--model.path", "nobody/nothing-of-this-name"), ["nobody/nothing"]),
    "no model given": (lambda p: ["score", "--data.path", p.text, "--out", p.out], ["--model.path"]),
    "model is a file": (lambda p: p.score("--model.path", p.file("m.bin", "x")), ["m.bin", "folder"]),
    "folder without config": (lambda p: p.score("--model.path", p.text), ["config.json", "--model.path"]),
    "folder without config, prune": (lambda p: p.cut("--model.path", p.text), ["config.json"]),
    "folder of a run": (
        lambda p: p.score("--model.path", run_folder(p, "model/config.json")),
        ["no config.json", "Did you mean", "ran/model?"],
    ),
    "config is no JSON": (
        lambda p: p.score("--model.path", p.file("config.json", "{").parent),
        ["config.json", "not JSON"],
    ),
    "config is a list": (lambda p: p.score("--model.path", p.file("config.json", "[]").parent), ["config.json"]),
    "config without type": (lambda p: p.score("--model.path", config_only(p, hidden_size=4)), ["model_type"]),
    "unknown architecture": (lambda p: p.score("--model.path", config_only(p, model_type="nosuch")), ["nosuch"]),
    "no weights": (lambda p: p.cut("--model.path", without(p, "model.safetensors")), ["no weights"]),
    "weights cut off, score": (lambda p: p.score("--model.path", broken_weights(p)), ["cut off"]),
    "weights cut off, plan": (
        lambda p: [*p.by_plan({LAYER: [0, 1]}), "--model.path", broken_weights(p)],
        ["cut off"],
    ),
    "weight missing, score": (
        lambda p: p.score("--model.path", without_tensor(p, "layers.1.block_sparse_moe.gate")),
        ["missing"],
    ),
    "expert missing, plan": (
        lambda p: [
            *p.by_plan({LAYER: [0, 1]}),
            "--model.path",
            without_tensor(p, "layers.1.block_sparse_moe.experts.3"),
        ],
        ["incomplete"],
    ),
    "llama4": (
        lambda p: p.score(
            "--model.path",
            config_only(
                p,
                model_type="llama4_text",
                architectures=["Llama4ForCausalLM"],
                hidden_size=32,
                intermediate_size=32,
                intermediate_size_mlp=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=64,
                num_local_experts=4,
            ),
        ),
        ["Llama 4", "not supported"],
    ),
    "deepseek v1, score": (
        lambda p: p.score("--model.path", config_only(p, model_type="deepseek")),
        ["convert", "lightning_moe.moe.deepseek_v1"],
    ),
    "deepseek v1, evaluate": (
        lambda p: p.evaluate("--model.path", config_only(p, model_type="deepseek")),
        ["convert"],
    ),
    "not finite, score": (
        lambda p: p.score("--model.path", damaged_copy(p.model, p.tmp / "nan")),
        ["not finite", "nan"],
    ),
    "not finite, prune from text": (
        lambda p: p.prune("--model.path", damaged_copy(p.model, p.tmp / "nan")),
        ["not finite"],
    ),
    "not finite, plan": (
        lambda p: [*p.by_plan({LAYER: [0, 1]}), "--model.path", damaged_copy(p.model, p.tmp / "nan", "embed_tokens")],
        ["not finite", "embed_tokens"],
    ),
    "not finite, evaluate": (
        lambda p: p.evaluate("--model.path", damaged_copy(p.model, p.tmp / "nan")),
        ["not finite"],
    ),
    "no tokenizer, score": (
        lambda p: p.score("--model.path", without(p, "tokenizer.json", "tokenizer_config.json")),
        ["tokenizer", "--data.tokenizer"],
    ),
    "no tokenizer, evaluate": (
        lambda p: p.evaluate("--data.tokenizer", p.tmp / "nowhere"),
        ["tokenizer", "nowhere"],
    ),
    "tokenizer of another model": (
        lambda p: p.score("--model.path", edited_smaller_vocabulary(p), "--data.tokenizer", p.model),
        ["tokenizer"],
    ),
}


def edited_smaller_vocabulary(place: Place) -> Path:
    """A model that knows fewer token ids than the tokenizer gives."""
    folder = place.tmp / "smaller"
    tiny_model("mixtral", vocab_size=40).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_refused_in_one_line(run: Commands, place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run, place, *MODELS[name], monkeypatch)


@pytest.mark.parametrize("command", ["score", "prune", "evaluate", "fit"])
def test_a_model_without_experts_is_refused_by_every_command(
    run: Commands, dense: Path, text: Path, tmp_path: Path, command: str
) -> None:
    out = [] if command == "fit" else ["--out", tmp_path / "out"]
    said = run(command, *QUIET, "--model.path", dense, "--data.path", text, *out)
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert str(dense) in said.err and "Mixture-of-Experts" in said.err and not (tmp_path / "out").exists()
