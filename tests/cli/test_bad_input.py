"""Bad options, plans, statistics and folders, each refused in a line, and what a refusal leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.bad_input import LAYER, Case, Cases, Place, assert_refused, run_folder
from tests.helpers.checkpoint import Commands, contents, damaged_copy, save_checkpoint


def other_model(place: Place) -> Path:
    """Same architecture, other weights."""
    return save_checkpoint(place.tmp / "another", seed=1)


def stats_of_deeper(place: Place) -> Path:
    """A model with the same experts but one layer more."""
    return save_checkpoint(place.tmp / "deeper", num_hidden_layers=3)


def folder_of_another_request(place: Place, command: str) -> None:
    place.out.mkdir()
    (place.out / f"{command}.json").write_text(json.dumps({"command": command, "request": {"model.path": "other"}}))


OPTIONS: Cases = {
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

PLANS: Cases = {
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

STATS: Cases = {
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


OUTS: Cases = {
    "a file": (_out_is_a_file, ["out", "a file"]),
    "below a file": (_out_below_a_file, ["mine"]),
    **{f"of another {c}": (_out_of_another(c), ["--out", c, "--overwrite"]) for c in ("score", "prune", "evaluate")},
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("option", OPTIONS),
        ("plan", PLANS),
        ("stats", STATS),
        ("out", OUTS),
    )
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(run: Commands, place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run, place, *CASES[name], monkeypatch)


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


@pytest.mark.parametrize(
    "option, value, known",
    [("direction", "up", "max"), ("scope", "both", "global"), ("data.samples", "zero", "whole numbers, all")],
)
def test_a_wrong_choice_is_told_the_right_ones(
    place: Place, run: Commands, option: str, value: str, known: str
) -> None:
    said = run(*place.cut(f"--{option}", value))
    assert said.code == 2 and f"--{option}: {value} is none of" in said.err and known in said.err
