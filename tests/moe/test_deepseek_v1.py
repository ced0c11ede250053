"""A DeepSeek-MoE v1 checkpoint and its qwen2_moe conversion are one function."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lightning_moe.moe import deepseek_v1
from lightning_moe.moe.deepseek_v1 import convert_deepseek_v1, is_deepseek_v1
from tests.helpers.deepseek_v1_reference import TINY, reference_logits, tiny_weights, write_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are only slowed down by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def converted_logits(folder: Path, input_ids: Tensor) -> Tensor:
    """Of the stock class, after checking that it found exactly what it wants."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(input_ids).logits


def assert_same_function(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    input_ids = torch.randint(0, TINY["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(7))
    expected = reference_logits(config, weights, input_ids)
    assert expected.std() > 0.5  # otherwise being equal would say little
    torch.testing.assert_close(converted_logits(folder, input_ids), expected, atol=1e-5, rtol=1e-5)


CHANGES: dict[str, dict[str, Any]] = {
    "as published": {},
    "renormalised": {"norm_topk_prob": True},
    "top 1": {"num_experts_per_tok": 1},
    "top 1, renormalised in name only": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "every expert": {"num_experts_per_tok": 8},
    "grouped queries": {"num_key_value_heads": 2},
    "no number of key heads": {"num_key_value_heads": None},
    "two dense layers": {"first_k_dense_replace": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "one shared expert": {"n_shared_experts": 1},
    "no shared expert": {"n_shared_experts": None},
    "zero shared experts": {"n_shared_experts": 0},
    "tied": {"tie_word_embeddings": True},
    "another rope base": {"rope_theta": 500.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "grown rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_the_logits_stay(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = TINY | changes
    weights = tiny_weights(config)
    convert_deepseek_v1(write_checkpoint(tmp_path / "v1", config, weights), tmp_path / "converted")
    assert_same_function(config, weights, tmp_path / "converted")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_to_store_it(tmp_path: Path, suffix: str, shards: int, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tiny_weights(TINY).items()}
    source = write_checkpoint(tmp_path / "v1", TINY, weights, shards=shards, suffix=suffix)
    convert_deepseek_v1(source, tmp_path / "converted")

    written = read_weights(tmp_path / "converted")
    for name, tensor in weights.items():
        new_name = name.replace("shared_experts", "shared_expert")
        factor = 2 if new_name.endswith("shared_expert.down_proj.weight") else 1
        assert torch.equal(written.pop(new_name), tensor * factor), name
    assert set(written) == {f"model.layers.{layer}.mlp.shared_expert_gate.weight" for layer in (1, 2)}
    assert all(tensor.dtype == dtype and not tensor.any() for tensor in written.values())

    assert_same_function(TINY, weights, tmp_path / "converted")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").dtype == dtype


def test_the_config(tmp_path: Path) -> None:
    convert_deepseek_v1(write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY)), tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    expected = {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "dtype": "float32",
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
        "mlp_only_layers": [0], "decoder_sparse_step": 1, "qkv_bias": False, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "use_sliding_window": False,
        "layer_types": ["full_attention"] * 3, "tie_word_embeddings": False, "router_aux_loss_coef": 0.01,
        "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "use_cache": True,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    assert "auto_map" not in config


def test_what_v1s_config_class_fills_in(tmp_path: Path) -> None:
    silent = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "norm_topk_prob",
              "bos_token_id", "eos_token_id", "moe_layer_freq", "scoring_func", "hidden_act",
              "tie_word_embeddings")  # fmt: skip
    config = {key: value for key, value in TINY.items() if key not in silent}
    convert_deepseek_v1(write_checkpoint(tmp_path / "v1", config, tiny_weights(TINY)), tmp_path / "converted")
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert written["max_position_embeddings"] == 2048 and written["rms_norm_eps"] == 1e-6
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (written["bos_token_id"], written["eos_token_id"]) == (100000, 100001)
    assert written["hidden_act"] == "silu"
    assert written["tie_word_embeddings"] is False and written["norm_topk_prob"] is False


def test_shards_make_no_difference(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY), shards=2)
    convert_deepseek_v1(source, tmp_path / "one")
    convert_deepseek_v1(source, tmp_path / "many", max_shard_bytes=20_000)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]

    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
    assert set(index["weight_map"]) == set(one) == set(many)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(name in load_file(tmp_path / "many" / shard) for name, shard in index["weight_map"].items())
    assert all(torch.equal(one[name], many[name]) for name in one)
    for folder in ("one", "many"):
        assert_same_function(TINY, tiny_weights(TINY), tmp_path / folder)


def test_views_in_a_pickle(tmp_path: Path) -> None:
    weights = tiny_weights(TINY)
    weights["lm_head.weight"] = weights["lm_head.weight"].T.contiguous().T
    both = torch.stack([weights[f"model.layers.{layer}.input_layernorm.weight"] for layer in (0, 1)])
    for layer in (0, 1):
        weights[f"model.layers.{layer}.input_layernorm.weight"] = both[layer]
    source = write_checkpoint(tmp_path / "v1", TINY, weights, suffix="bin")
    convert_deepseek_v1(source, tmp_path / "converted")
    assert_same_function(TINY, weights, tmp_path / "converted")


def test_tensors_that_follow_from_the_config_are_dropped(tmp_path: Path) -> None:
    config = TINY | {"tie_word_embeddings": True}
    weights = tiny_weights(config)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    extra["lm_head.weight"] = torch.zeros(96, 32)
    source = write_checkpoint(tmp_path / "v1", config, weights | extra)
    convert_deepseek_v1(source, tmp_path / "converted")
    assert_same_function(config, weights, tmp_path / "converted")


def test_a_config_saved_by_transformers_5(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    config = {key: value for key, value in TINY.items() if not key.startswith("rope_")}
    source = write_checkpoint(tmp_path / "v1", config | {"rope_parameters": rope}, tiny_weights(TINY))
    convert_deepseek_v1(source, tmp_path / "converted")
    same = TINY | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert_same_function(same, tiny_weights(TINY), tmp_path / "converted")


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE that, like DeepSeek's, does not split text where Qwen's does: digits stay together."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["one, two, three and 1234 more of them, don't you think?"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_the_tokenizer_travels(tmp_path: Path, declared: str | None) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY))
    tokenizer = write_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = declared
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_deepseek.DeepseekTokenizer", None]}
    settings = {key: value for key, value in settings.items() if value is not None}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    data = ["special_tokens_map.json", "added_tokens.json", "generation_config.json", "vocab.json",
            "merges.txt", "tokenizer.model", "chat_template.jinja"]  # fmt: skip
    for name in data:
        (source / name).write_text("{}")
    others = ["modeling_deepseek.py", "configuration_deepseek.py", "tokenization_deepseek.py", "tokenizer.py",
              "tokenizer.pkl", "README.md", "training_args.bin"]  # fmt: skip
    for name in others:
        (source / name).write_text("raise SystemExit('must not run')")

    convert_deepseek_v1(source, tmp_path / "converted")
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *data}
    assert "auto_map" not in json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())
    for name in data + ["tokenizer.json"]:
        assert (tmp_path / "converted" / name).read_bytes() == (source / name).read_bytes()

    for name in data:  # empty ones, only good for having been copied
        (tmp_path / "converted" / name).unlink()
    text = "three and 1234 more,\ndon't you  think?"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_new_parents_and_empty_folders_are_fine(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY))
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new" / "parents" / "converted", tmp_path / "empty"):
        convert_deepseek_v1(source, target)
        assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "new", "empty"}


def test_the_source_is_left_alone(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY), suffix="bin")
    write_tokenizer(source)
    before = {path: path.read_bytes() for path in source.iterdir()}
    convert_deepseek_v1(source, tmp_path / "converted")
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_is_deepseek_v1() -> None:
    assert is_deepseek_v1(TINY)
    for other in ("deepseek_v2", "deepseek_v3", "qwen2_moe", None):
        assert not is_deepseek_v1(TINY | {"model_type": other})
    assert not is_deepseek_v1({})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY))
    arguments = [str(source), str(tmp_path / "converted")]
    deepseek_v1.main(arguments)
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    assert capsys.readouterr() == ("", "")

    error = f"error: {arguments[1]} already exists and is not an empty folder: choose another target\n"
    with pytest.raises(SystemExit) as left:
        deepseek_v1.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", error)

    command = [sys.executable, "-m", "lightning_moe.moe.deepseek_v1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(error) and "Traceback" not in done.stderr
