"""A config without weights: a folder, a file, DeepSeek-MoE v1; and what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_moe.errors import InputError
from lightning_moe.moe.checkpoints import resolve
from lightning_moe.moe.lone_config import lone_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_a_file_and_a_folder_are_the_same(tmp_path: Path) -> None:
    file = CONFIGS / "mixtral_8x7b.json"
    shutil.copy(file, tmp_path / "config.json")
    assert lone_config(str(file)).to_json_string() == lone_config(str(tmp_path)).to_json_string()


def test_deepseek_v1_is_converted() -> None:
    config = lone_config(str(CONFIGS / "deepseek_moe_16b.json"))
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen2_moe", 64, 6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ('{"model_type": "nothing_known"}', "nothing_known"),
        ('{"model_type": "mixtral", "quantization_config": {"bits": 4}}', "quantised already"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(InputError, match=says) as error:
        lone_config(str(file))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--model.path {file}")


@pytest.mark.parametrize("path", ["/no/where", "./nowhere", "~/nowhere", "missing.json", "a/b.json", "a/b/c", "a/b/"])
def test_what_can_be_no_hub_id_is_refused_at_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub, which takes long to say that it knows no such model, is not asked; neither is it for a model."""

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("lightning_moe.moe.lone_config.hf_hub_download", asked)
    monkeypatch.setattr("lightning_moe.moe.checkpoints.snapshot_download", asked)
    for find in (lone_config, resolve):
        with pytest.raises(InputError, match=f"^--model.path {path}: no such folder( or file)?\\.$"):
            find(path)


def test_what_the_hub_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="on the hub"):
        lone_config("no/such")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="no config"):
        lone_config(str(tmp_path))
