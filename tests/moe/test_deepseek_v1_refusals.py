"""What of a DeepSeek-MoE v1 checkpoint cannot be converted is refused in a line, and nothing is left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_moe.errors import InputError
from lightning_moe.moe import deepseek_v1
from lightning_moe.moe.deepseek_v1 import convert_deepseek_v1
from tests.helpers.deepseek_v1_reference import TINY, tiny_weights, write_checkpoint

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "v2": ({"model_type": "deepseek_v2"}, r"model_type is 'deepseek_v2', and it must be 'deepseek'"),
    "no type": ({"model_type": None}, r"model_type is None"),
    "sigmoid": ({"scoring_func": "sigmoid"}, r"scoring_func is 'sigmoid', and only 'softmax' maps"),
    "sparse steps": ({"moe_layer_freq": 2}, r"moe_layer_freq is 2, and only 1 maps"),
    "biases": ({"attention_bias": True}, r"attention_bias is True, and only False maps"),
    "scaled": ({"routed_scaling_factor": 16.0}, r"routed_scaling_factor is 16\.0, and only 1 maps"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config is .*gptq"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling is .*yarn.*only linear and"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, r"not a valid qwen2_moe config: .*factor"),
    "dense": ({"n_routed_experts": None}, r"n_routed_experts is None, and a positive integer is needed"),
    "none chosen": (
        {"num_experts_per_tok": 0},
        r"num_experts_per_tok is 0, and a positive integer is needed",
    ),
    "bad shared": ({"n_shared_experts": 1.5}, r"n_shared_experts is 1\.5, and a positive integer is needed"),
    "bad type": ({"rms_norm_eps": "small"}, r"not a valid qwen2_moe config: .*rms_norm_eps"),
    "few shared": ({"n_shared_experts": 1}, r"shared_experts\.\w+_proj\.weight is .*, and config\.json says"),
    "few layers": (
        {"num_hidden_layers": 2},
        r"has unexpected tensors \(34\): model\.layers\.2\.\S+, .*, \.{3}$",
    ),
    "many layers": ({"num_hidden_layers": 4}, r"lacks tensors \(34\): model\.layers\.3\.\S+, .*, \.{3}$"),
    "no shared": ({"n_shared_experts": None}, r"has unexpected tensors \(6\): \S+shared_experts"),
}


def assert_refused(source: Path, target: Path, message: str) -> None:
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        convert_deepseek_v1(source, target)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(target.parent.rglob("*")) == before


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_configs_that_do_not_map(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY | changes, tiny_weights(TINY))
    assert_refused(source, tmp_path / "converted", message)


def test_the_published_config_is_accepted(tmp_path: Path) -> None:
    published = TINY | {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    # Past the config, to the tensors: 3 outside the layers, 9 in the dense one, 6 + 1 + 65 * 3 in each other.
    source = write_checkpoint(tmp_path / "v1", published, {"model.norm.weight": torch.ones(2048)})
    missing = 3 + 9 + 27 * 202 - 1
    assert_refused(source, tmp_path / "converted", rf"lacks tensors \({missing}\): lm_head\.weight, ")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    weights = tiny_weights(TINY)
    missing = {name: weights[name] for name in weights if name not in ("lm_head.weight", "model.norm.weight")}
    source = write_checkpoint(tmp_path / "missing", TINY, missing)
    assert_refused(source, tmp_path / "out", r"lacks tensors \(2\): lm_head\.weight, model\.norm\.weight$")
    biased = weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    source = write_checkpoint(tmp_path / "biased", TINY, biased)
    assert_refused(source, tmp_path / "out", r"has unexpected tensors \(1\): \S+self_attn\.q_proj\.bias$")
    integers = weights | {"lm_head.weight": torch.ones(96, 32, dtype=torch.int8)}
    source = write_checkpoint(tmp_path / "integers", TINY, integers)
    assert_refused(source, tmp_path / "out", r"lm_head\.weight is torch\.int8: only unquantised")
    name = "model.layers.2.mlp.shared_experts.down_proj.weight"
    large = {key: tensor.half() for key, tensor in weights.items()}
    large[name] = large[name].clone().index_fill_(0, torch.tensor([3]), 40_000.0)
    source = write_checkpoint(tmp_path / "large", TINY, large)
    assert_refused(source, tmp_path / "out", r"layers\.2\S+ overflows float16 when doubled: cast it")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    assert_refused(tmp_path / "nothing", tmp_path / "out", r"cannot read \S+config\.json")
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY), shards=2, suffix=suffix)
    last = max(source.glob(f"*.{suffix}"))
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert_refused(source, tmp_path / "out", rf"cannot read \S+{last.name}: \S+")
    last.unlink()
    assert_refused(source, tmp_path / "out", rf"cannot read \S+{last.name}: \S+")
    for path in source.glob("*model*"):
        path.unlink()
    assert_refused(source, tmp_path / "out", r"holds no weights: neither model\.safetensors nor")
    (source / "config.json").write_text("[1, 2]")
    assert_refused(source, tmp_path / "out", r"cannot read \S+config\.json")


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("must not run",))

    source = write_checkpoint(tmp_path / "v1", TINY, {})
    (source / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Boom()}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path / "out", r"cannot read \S+pytorch_model\.bin: Weights only load failed")


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file", "v1"):
        assert_refused(source, tmp_path / name, rf"{name} already exists and is not an empty folder: choose")
    assert_refused(source, tmp_path / "file" / "deeper", r"file is not a folder: choose another target")
    assert (tmp_path / "full" / "kept.txt").read_text() == (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    source = write_checkpoint(tmp_path / "v1", TINY, tiny_weights(TINY))
    save, calls = deepseek_v1.save_file, 0

    def fails_later(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        save(*arguments, **options)

    monkeypatch.setattr(deepseek_v1, "save_file", fails_later)
    with pytest.raises(type(error)):
        convert_deepseek_v1(source, tmp_path / "deep" / "converted", max_shard_bytes=20_000)
    assert calls == 3
    assert {path.name for path in tmp_path.iterdir()} == {"v1"}
