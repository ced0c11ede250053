"""Bad input: one line on stderr that names the cause, exit code 2, and nothing written."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.checkpoint import Commands, contents, damaged_copy, save_checkpoint
from tests.helpers.families import tiny_model

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
LAYER = "model.layers.0.mlp"


@dataclass(frozen=True)
class Place:
    """What a bad command line can be made of."""

    tmp: Path
    model: Path
    text: Path
    stats: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def score(self, *args: object) -> list[object]:
        return ["score", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def prune(self, *args: object) -> list[object]:
        """From text."""
        return ["prune", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def cut(self, *args: object) -> list[object]:
        """From statistics."""
        return ["prune", *QUIET, "--model.path", self.model, "--stats", self.stats, "--out", self.out, *args]

    def by_scores(self, file: Path) -> list[object]:
        return ["prune", *QUIET, "--model.path", self.model, "--scores", file, "--out", self.out]

    def by_plan(self, value: object, **keys: object) -> list[object]:
        content = value if isinstance(value, str) else json.dumps({"keep": value, **keys})
        file = self.file(f"{len(list(self.tmp.glob('*plan.json')))}plan.json", content)
        return ["prune", *QUIET, "--model.path", self.model, "--plan", file, "--out", self.out]

    def evaluate(self, *args: object) -> list[object]:
        return ["evaluate", *QUIET, "--model.path", self.model, "--data.path", self.text, "--out", self.out, *args]

    def compare(self, *args: object) -> list[object]:
        return ["compare", *self.evaluate(*args)[1:]]

    def file(self, name: str, content: str | bytes) -> Path:
        file = self.tmp / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file


@pytest.fixture(scope="module")
def stats_file(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_moe.cli.main import main

    folder = tmp_path_factory.mktemp("stats")
    args = ("score", *QUIET, "--model.path", checkpoint, "--data.path", text, "--data.samples", 4, "--out", folder)
    main([str(arg) for arg in args])
    return folder / "stats.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without experts."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, text: Path, stats_file: Path) -> Place:
    return Place(tmp_path, checkpoint, text, stats_file)


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


def run_folder(place: Place, *files: str) -> Path:
    """The folder of some command that left these files, and whatever is in them."""
    for file in (place.tmp / "ran" / name for name in files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return place.tmp / "ran"


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


def other_model(place: Place) -> Path:
    """Same architecture, other weights."""
    return save_checkpoint(place.tmp / "another", seed=1)


def stats_of_deeper(place: Place) -> Path:
    """A model with the same experts but one layer more."""
    return save_checkpoint(place.tmp / "deeper", num_hidden_layers=3)


def folder_of_another_request(place: Place, command: str) -> None:
    place.out.mkdir()
    (place.out / f"{command}.json").write_text(json.dumps({"command": command, "request": {"model.path": "other"}}))


Case = Callable[[Place], list[object]]

# Each case: what to run, and what the line must name.
MODELS: dict[str, tuple[Case, list[str]]] = {
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


TEXTS: dict[str, tuple[Case, list[str]]] = {
    "no text given": (lambda p: ["score", "--model.path", p.model, "--out", p.out], ["--data.path"]),
    "no text given, evaluate": (lambda p: ["evaluate", "--model.path", p.model, "--out", p.out], ["--data.path"]),
    "missing text": (lambda p: p.score("--data.path", p.tmp / "nowhere"), ["nowhere", "no such file"]),
    "missing text file": (lambda p: p.score("--data.path", "nowhere.jsonl"), ["nowhere.jsonl"]),
    "no such dataset": (lambda p: p.score("--data.path", "nobody/no-dataset"), ["nobody/no-dataset"]),
    "empty text": (lambda p: p.score("--data.path", p.file("a.txt", "")), ["a.txt", "too little text"]),
    "blank text": (lambda p: p.evaluate("--data.path", p.file("a.txt", " \n\n\n\n ")), ["a.txt", "too little text"]),
    "too short text": (lambda p: p.prune("--data.path", p.file("a.jsonl", '{"text": ""}')), ["a.jsonl", "too little"]),
    "empty folder": (lambda p: p.score("--data.path", p.tmp), ["no text found", ".parquet"]),
    "unknown suffix": (lambda p: p.score("--data.path", p.file("a.doc", "Words.")), ["a.doc", ".txt"]),
    "no text field": (
        lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": "ok"}\n{"body": "no"}\n')),
        ["a.jsonl", "line 2", "text"],
    ),
    "text is a number": (lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": 3}\n')), ["line 1", "text"]),
    "broken line": (
        lambda p: p.score("--data.path", p.file("a.jsonl", '{"text": "ok"}\n\n{"text": "no\n')),
        ["a.jsonl", "line 3", "not JSON"],
    ),
    "not UTF-8": (lambda p: p.score("--data.path", p.file("a.txt", b"caf\xe9 au lait")), ["a.txt", "UTF-8"]),
    "not UTF-8, jsonl": (lambda p: p.score("--data.path", p.file("a.jsonl", b'{"text": "\xe9"}')), ["UTF-8"]),
    "not gzip": (lambda p: p.score("--data.path", p.file("a.jsonl.gz", '{"text": "ok"}')), ["a.jsonl.gz"]),
    "gzip cut off": (
        lambda p: p.score("--data.path", p.file("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 999)[:60])),
        ["a.jsonl.gz"],
    ),
    "not parquet": (lambda p: p.score("--data.path", p.file("a.parquet", "PAR1 no")), ["a.parquet"]),
    "parquet without text": (lambda p: p.score("--data.path", parquet(p, body=["Words."])), ["text", "body"]),
    "parquet of numbers": (lambda p: p.score("--data.path", parquet(p, text=[1, 2, 3])), ["p.parquet"]),
}


def parquet(place: Place, **columns: list[object]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), place.tmp / "p.parquet")
    return place.tmp / "p.parquet"


OPTIONS: dict[str, tuple[Case, list[str]]] = {
    "ratio 0": (lambda p: p.cut("--ratio", 0), ["--ratio", "between 0 and 1"]),
    "ratio 1": (lambda p: p.cut("--ratio", 1), ["--ratio", "between 0 and 1"]),
    "ratio below": (lambda p: p.cut("--ratio", "-0.5"), ["--ratio", "-0.5"]),
    "ratio above": (lambda p: p.prune("--ratio", 50), ["--ratio", "50"]),
    "ratio not a number": (lambda p: p.cut("--ratio", "nan"), ["ratio", "nan"]),
    "ratio a word": (lambda p: p.cut("--ratio", "half"), ["ratio", "half"]),
    "drops nothing": (lambda p: p.cut("--ratio", 0.05), ["0.05", "drops nothing", "0.125"]),
    "drops too much": (lambda p: p.prune("--ratio", 0.9), ["0.9", "drops 7", "0.75"]),
    "drops nothing, global": (lambda p: p.cut("--ratio", 0.02, "--scope", "global"), ["drops nothing", "0.0625"]),
    "drops too much, global": (lambda p: p.cut("--ratio", 0.9, "--scope", "global"), ["0.75"]),
    "floor too high": (lambda p: p.cut("--floor", 9, "--scope", "global"), ["--floor", "8"]),
    "unknown method": (lambda p: p.cut("--method", "reep"), ["'reep'", "'reap'"]),
    "method in capitals": (lambda p: p.cut("--method", "EAN"), ["'EAN'", "'ean'"]),
    "unknown end": (lambda p: p.cut("--method", "ean-mx"), ["'ean-mx'", "'ean-max'"]),
    "a scope behind the method": (
        lambda p: p.cut("--method", "ean-mx@global"),
        ["Did you mean 'ean-max'?", "give --scope global"],
    ),
    "a scope misspelt behind the method": (
        lambda p: p.compare("--methods", "[ean-mx@global]"),
        ["--methods", "Did you mean 'ean-max'?"],
    ),
    "a scope without its sign": (lambda p: p.compare("--methods", "[ean-global]"), ["Did you mean 'ean@global'?"]),
    "unknown method, nothing near": (lambda p: p.cut("--method", "zzz"), ["'zzz'", "reap"]),
    "unknown scope": (lambda p: p.cut("--scope", "layers"), ["layers", "layer", "global"]),
    "unknown direction": (lambda p: p.cut("--direction", "up"), ["up", "min", "max"]),
    "unknown option": (lambda p: p.cut("--ration", 0.5), ["--ration", "Did you mean --ratio?"]),
    "unknown data option": (lambda p: p.score("--data.sampels", 3), ["sampels", "Did you mean --data.samples?"]),
    "unknown trainer option": (lambda p: p.score("--trainer.device", 1), ["--trainer.device", "--trainer.devices"]),
    "unknown command": (lambda p: ["scor", "--out", p.out], ["scor", "score"]),
    "command far off": (lambda p: ["xyz"], ["xyz", "prune"]),
    "no command": (lambda p: [], ["score"]),
    "no out": (lambda p: ["score", "--model.path", p.model, "--data.path", p.text], ["--out"]),
    "batch size": (lambda p: p.score("--data.batch_size", -1), ["batch_size", "-1"]),
    "batch size 0": (lambda p: p.evaluate("--data.batch_size", 0), ["batch_size", "0"]),
    "samples": (lambda p: p.score("--data.samples", 0), ["samples", "0"]),
    "window of one token": (lambda p: p.score("--data.seq_len", 1), ["seq_len", "1"]),
    "samples a word": (lambda p: p.score("--data.samples", "many"), ["samples", "many"]),
    "missing config": (lambda p: ["score", "--config", p.tmp / "no.yaml"], ["no.yaml"]),
    "two sources": (lambda p: p.cut("--data.path", p.text), ["--data.path", "--stats"]),
    "no source": (
        lambda p: ["prune", "--model.path", p.model, "--out", p.out],
        ["--data.path", "--stats", "--plan", "none"],
    ),
}

PLANS: dict[str, tuple[Case, list[str]]] = {
    "missing plan": (
        lambda p: ["prune", "--model.path", p.model, "--out", p.out, "--plan", p.tmp / "no.json"],
        ["no.json"],
    ),
    "plan is no JSON": (lambda p: p.by_plan("{'keep': }"), ["plan.json", "not JSON"]),
    "plan is a list": (lambda p: p.by_plan("[1, 2]"), ["plan.json", "keep"]),
    "plan without keep": (lambda p: p.by_plan('{"kept": {}}'), ["plan.json", "keep"]),
    "plan of another version": (lambda p: p.by_plan({LAYER: [0, 1]}, version=99), ["plan.json", "99"]),
    "ids are words": (lambda p: p.by_plan({LAYER: ["a", "b"]}), ["plan.json", LAYER]),
    "ids are true": (lambda p: p.by_plan({LAYER: [True, False]}), ["plan.json", LAYER]),
    "a layer too many": (lambda p: p.by_plan({"model.layers.7.mlp": [0, 1]}), ["model.layers.7.mlp"]),
    "expert too high": (lambda p: p.by_plan({LAYER: [0, 1, 8]}), [LAYER, "8", "0 to 7"]),
    "expert below": (lambda p: p.by_plan({LAYER: [-1, 1, 2]}), [LAYER, "-1"]),
    "expert twice": (lambda p: p.by_plan({LAYER: [1, 1, 2]}), [LAYER, "different"]),
    "fewer than top_k": (lambda p: p.by_plan({LAYER: [1]}), [LAYER, "top_k=2"]),
    "none kept": (lambda p: p.by_plan({LAYER: [], LAYER.replace("0", "1"): []}), ["drops all", "at least one"]),
    "blocks in words": (lambda p: p.by_plan({}, blocks="model.layers.0.mlp"), ["plan.json", "`blocks`"]),
    "a block that is not there": (lambda p: p.by_plan({}, blocks=["model.layers.9.mlp"]), ["model.layers.9.mlp"]),
    "a block that keeps experts": (lambda p: p.by_plan({LAYER: [0, 1]}, blocks=[LAYER]), [LAYER, "`blocks`"]),
    "another model": (lambda p: p.by_plan({LAYER: [0, 1]}, model_id="mixtral@0123456789ab"), ["mixtral@0123456789ab"]),
}

STATS: dict[str, tuple[Case, list[str]]] = {
    "missing stats": (lambda p: p.cut("--stats", p.tmp / "no.safetensors"), ["no.safetensors"]),
    "folder without stats": (lambda p: p.cut("--stats", p.tmp), ["stats.safetensors", "no such file"]),
    "folder with scores": (
        lambda p: p.cut("--stats", run_folder(p, "scores.json")),
        ["scores, and no statistics", "--scores"],
    ),
    "folder with statistics": (
        lambda p: p.by_scores(run_folder(p, "stats.safetensors")),
        ["statistics and no scores", "--stats"],
    ),
    "stats of other weights": (lambda p: p.cut("--model.path", other_model(p)), ["another@", "tiny@"]),
    "stats of another depth": (lambda p: p.cut("--model.path", stats_of_deeper(p)), ["deeper@", "tiny@"]),
    "a JSON file": (lambda p: p.cut("--stats", p.file("s.safetensors", "{}")), ["s.safetensors"]),
    "weights": (lambda p: p.cut("--stats", p.model / "model.safetensors"), ["model.safetensors", "version"]),
    "cut off": (
        lambda p: p.cut("--stats", p.file("s.safetensors", p.stats.read_bytes()[:-100])),
        ["s.safetensors", "not a statistics file"],
    ),
}


def _out_is_a_file(place: Place) -> list[object]:
    place.out.write_text("mine")
    return place.score()


def _out_below_a_file(place: Place) -> list[object]:
    place.file("mine", "mine")
    return place.score("--out", place.tmp / "mine" / "run")


def _out_of_another(command: str) -> Case:
    def case(place: Place) -> list[object]:
        folder_of_another_request(place, command)
        return {"score": place.score, "prune": place.cut, "evaluate": place.evaluate}[command]()

    return case


OUTS: dict[str, tuple[Case, list[str]]] = {
    "a file": (_out_is_a_file, ["out", "a file"]),
    "below a file": (_out_below_a_file, ["mine"]),
    **{f"of another {c}": (_out_of_another(c), ["--out", c, "--overwrite"]) for c in ("score", "prune", "evaluate")},
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("model", MODELS),
        ("text", TEXTS),
        ("option", OPTIONS),
        ("plan", PLANS),
        ("stats", STATS),
        ("out", OUTS),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(run: Commands, place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, named = CASES[name]
    monkeypatch.chdir(place.tmp)
    args = make(place)
    before = contents(place.tmp)
    folders = sorted(place.tmp.rglob("*"))
    result = run(*args)
    assert result.code == 2, result.out
    assert len(result.err.splitlines()) == 1, result.err
    assert "Traceback" not in result.err
    for part in named:
        assert part in result.err, result.err
    assert contents(place.tmp) == before
    assert sorted(place.tmp.rglob("*")) == folders


def test_a_refusal_leaves_earlier_results(run: Commands, place: Place, text: Path) -> None:
    """What another command has left in the folder is untouched, and can be used after."""
    run.ok(*place.score("--data.samples", 4))
    before = contents(place.out)
    for args in (
        place.prune("--ratio", 0.01),
        place.prune("--method", "reep"),
        place.prune("--data.path", place.file("empty.txt", "")),
        [*place.by_plan({LAYER: [0, 99]})],
        place.evaluate("--model.path", place.tmp / "nowhere"),
        [*place.by_plan({LAYER: [0, 1]}), "--model.path", damaged_copy(place.model, place.tmp / "nan", "embed_tokens")],
    ):
        result = run(*args)
        assert result.code == 2
        assert contents(place.out) == before, result.err


def test_ours_to_mend_keeps_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bad input is told in a line; a defect shows where it is."""
    from lightning_moe.cli import trainer
    from lightning_moe.cli.main import main

    def defect(*args: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(trainer, "score", defect)
    with pytest.raises(AssertionError, match="ours"):
        main([str(arg) for arg in place.score()])


@pytest.mark.parametrize("command", ["score", "prune", "evaluate", "fit"])
def test_a_model_without_experts_is_refused_by_every_command(
    run: Commands, dense: Path, text: Path, tmp_path: Path, command: str
) -> None:
    out = [] if command == "fit" else ["--out", tmp_path / "out"]
    said = run(command, *QUIET, "--model.path", dense, "--data.path", text, *out)
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert str(dense) in said.err and "Mixture-of-Experts" in said.err and not (tmp_path / "out").exists()


def test_windows_longer_than_the_model_knows_are_refused(place: Place, run: Commands) -> None:
    said = run(*place.evaluate("--data.seq_len", 100_000))
    assert said.code == 2 and "at most" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    "option, value, known",
    [("direction", "up", "max"), ("scope", "both", "global"), ("data.samples", "zero", "whole numbers, all")],
)
def test_a_wrong_choice_is_told_the_right_ones(
    place: Place, run: Commands, option: str, value: str, known: str
) -> None:
    said = run(*place.cut(f"--{option}", value))
    assert said.code == 2 and f"--{option}: {value} is none of" in said.err and known in said.err
