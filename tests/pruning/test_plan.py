"""A plan is a file for people: it comes back as it was, and each fault in it is one line."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_moe.errors import InputError
from lightning_moe.moe.layers import LayerShape
from lightning_moe.moe.merged_experts import Merge, Router
from lightning_moe.pruning.plan import VERSION, PruningPlan, agreement, compose, cut_shapes, load_plan

SHAPES = [
    LayerShape("model.layers.0.mlp", 0, 4, 2),
    LayerShape("model.layers.1.mlp", 1, 8, 2),
    LayerShape("model.layers.2.mlp", 2, 8, 2, 2, 1),
]
KEEP = {"model.layers.0.mlp": [0, 3], "model.layers.1.mlp": [1, 2, 5], "model.layers.2.mlp": [0, 1, 6, 7]}
MERGE = {"model.layers.1.mlp": {1: {0: 0.25, 1: 0.5, 7: 0.25}, 5: {3: 1 / 3, 5: 2 / 3}}}
MODEL = "tiny@0123456789ab"


def written(tmp_path: Path, value: Any) -> Path:
    file = tmp_path / "plan.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def refusal(file: Path, model_id: str = MODEL) -> str:
    """What is said of a plan, when it is read or when it is held against the model."""
    with pytest.raises(InputError) as refused:
        load_plan(file).check(SHAPES, model_id)
    message = str(refused.value)
    assert "\n" not in message and 20 < len(message) < 400
    return message


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    made_by = {"method": "reap", "ratio": 0.5, "scope": "global", "floor": None, "direction": "min", "seed": 3}
    plan = PruningPlan(KEEP, MODEL, "data@23", made_by)
    plan.save(tmp_path / "new" / "plan.json")
    loaded = load_plan(tmp_path / "new" / "plan.json")
    assert loaded == plan
    loaded.check(SHAPES, MODEL)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "plan.json").read_bytes()
    assert json.loads((tmp_path / "again.json").read_text())["version"] == VERSION
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "new"]


@pytest.mark.parametrize(("align", "router"), [(False, "kept"), (True, "mean")])
def test_a_plan_that_merges_comes_back_as_it_was(align: bool, router: Router, tmp_path: Path) -> None:
    plan = PruningPlan(KEEP, MODEL, "data@23", {"method": "reap"}, Merge(MERGE, align, router))
    assert plan.num_merged == 3
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    loaded.check(SHAPES, MODEL)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_that_drops_layers_comes_back_as_it_was(tmp_path: Path) -> None:
    """One by its MoE block, one as a whole; by hand the name under ``blocks`` is enough."""
    keep = {**KEEP, "model.layers.0.mlp": [], "model.layers.1.mlp": []}
    plan = PruningPlan(keep, MODEL, "data@23", {"method": "block-drop"}, blocks=["model.layers.1.mlp"])
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    loaded.check(SHAPES, MODEL)
    by_hand = load_plan(written(tmp_path, {"keep": {}, "blocks": ["model.layers.1.mlp"]}))
    assert (by_hand.keep, by_hand.blocks) == ({"model.layers.1.mlp": []}, ["model.layers.1.mlp"])
    by_hand.check(SHAPES, MODEL)
    PruningPlan(KEEP).save(tmp_path / "plan.json")
    assert "blocks" not in json.loads((tmp_path / "plan.json").read_text())


def test_a_plan_that_does_not_merge_says_nothing_of_it(tmp_path: Path) -> None:
    """As all plans did before there was merging."""
    PruningPlan(KEEP).save(tmp_path / "plan.json")
    assert "merge" not in json.loads((tmp_path / "plan.json").read_text())
    for nothing in ({}, None):
        assert load_plan(written(tmp_path, {"keep": KEEP, "merge": nothing})) == PruningPlan(KEEP)


def test_few_digits_are_enough(tmp_path: Path) -> None:
    merge = {"model.layers.0.mlp": {"3": {"1": 0.333, "2": 0.333, "3": 0.333}}}
    plan = load_plan(written(tmp_path, {"keep": KEEP, "merge": merge}))
    plan.check(SHAPES, MODEL)
    assert plan.merge.settings == {"align": False, "router": "kept"}  # as all plans before there was a choice


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    file = written(tmp_path, "something else")
    PruningPlan(KEEP).save(file)
    assert load_plan(file) == PruningPlan(KEEP)


def test_a_plan_by_hand_needs_keep_alone(tmp_path: Path) -> None:
    """Ids in any order, any layers left out: those stay whole. It fits every model that has such layers."""
    plan = load_plan(written(tmp_path, {"keep": {"model.layers.1.mlp": [5, 1, 2]}}))
    assert plan == PruningPlan({"model.layers.1.mlp": [1, 2, 5]})
    plan.check(SHAPES, MODEL)
    plan.check(SHAPES, "another@ba9876543210")


def test_a_plan_fits_its_model_wherever_that_lies(tmp_path: Path) -> None:
    """The fingerprint says which model it is, not the name of the folder."""
    plan = load_plan(written(tmp_path, {"keep": KEEP, "model_id": MODEL}))
    plan.check(SHAPES, MODEL)
    plan.check(SHAPES, "moved@0123456789ab")


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, {"keep": KEEP, "model_id": "other@ba9876543210"}))
    assert "other@ba9876543210" in message and MODEL in message and "model_id" in message


FAULTY_FILES: dict[str, tuple[Any, str]] = {
    "empty": ("", "not JSON"),
    "not JSON": ("{keep: }", "not JSON"),
    "cut short": (json.dumps({"keep": KEEP})[:40], "not JSON"),
    "a list": ([1, 2], "no `keep`"),
    "a number": ("3", "no `keep`"),
    "null": ("null", "no `keep`"),
    "no keep": ({"drop": KEEP}, "no `keep`"),
    "keep a list": ({"keep": [0, 1]}, "no `keep`"),
    "keep null": ({"keep": None}, "no `keep`"),
    "newer version": ({"keep": KEEP, "version": 9}, "version 9"),
    "version in words": ({"keep": KEEP, "version": "two"}, "version two"),
    "ids a number": ({"keep": {"model.layers.0.mlp": 3}}, "model.layers.0.mlp"),
    "ids in words": ({"keep": {"model.layers.0.mlp": ["0", "1"]}}, "model.layers.0.mlp"),
    "ids with a fraction": ({"keep": {"model.layers.0.mlp": [0, 1.5]}}, "1.5"),
    "ids true or false": ({"keep": {"model.layers.0.mlp": [True, False]}}, "True"),
    "a null among ids": ({"keep": {"model.layers.0.mlp": [None, 1]}}, "None"),
    "model_id a number": ({"keep": KEEP, "model_id": 5}, "model"),
    "model_id a list": ({"keep": KEEP, "model_id": ["tiny"]}, "model"),
    "unknown layer": ({"keep": {"model.layers.9.mlp": [0, 1]}}, "model.layers.9.mlp"),
    "id too high": ({"keep": {"model.layers.0.mlp": [0, 4]}}, "expert 4"),
    "id too low": ({"keep": {"model.layers.0.mlp": [-1, 0]}}, "expert -1"),
    "too few": ({"keep": {"model.layers.1.mlp": [5]}}, "top_k=2"),
    "nothing at all": ({"keep": {shape.name: [] for shape in SHAPES}}, "at least one"),
    "nothing, by both ways": ({"keep": {shape.name: [] for shape in SHAPES[:2]}, "blocks": [SHAPES[2].name]}, "all 3"),
    "blocks a name": ({"keep": {}, "blocks": "model.layers.1.mlp"}, "`blocks`"),
    "blocks by number": ({"keep": {}, "blocks": [1]}, "`blocks`"),
    "an unknown block": ({"keep": {}, "blocks": ["model.layers.9.mlp"]}, "model.layers.9.mlp"),
    "a block that keeps experts": ({"keep": KEEP, "blocks": ["model.layers.1.mlp"]}, "`blocks`"),
    "an id twice": ({"keep": {"model.layers.1.mlp": [5, 5, 6]}}, "different"),
    **{
        f"merge, {name}": ({"keep": KEEP, "merge": merge}, said)
        for name, (merge, said) in {
            "a list": ([1, 2], "`merge` must name layers"),
            "false": (False, "`merge` must name layers"),
            "a layer a list": ({"model.layers.0.mlp": [1, 2]}, "`merge` must name layers"),
            "a group a list": ({"model.layers.0.mlp": {"0": [0, 1]}}, "`merge` must name layers"),
            "ids in words": ({"model.layers.0.mlp": {"0": {"one": 1.0}}}, "`merge` must name layers"),
            "unknown layer": ({"model.layers.9.mlp": {"0": {"0": 1.0}}}, "model.layers.9.mlp"),
            "id too high": ({"model.layers.0.mlp": {"0": {"0": 0.5, "4": 0.5}}}, "expert 4"),
            "into a dropped one": ({"model.layers.0.mlp": {"1": {"1": 0.5, "2": 0.5}}}, "does not keep"),
            "of a kept one": ({"model.layers.0.mlp": {"0": {"0": 0.5, "3": 0.5}}}, "keeps it too"),
            "twice": ({"model.layers.0.mlp": {i: {i: 0.5, "1": 0.5} for i in ("0", "3")}}, "twice"),
            "too much": ({"model.layers.0.mlp": {"0": {"0": 1.0, "1": 0.5}}}, "sum to 1.5"),
            "NaN": ({"model.layers.0.mlp": {"0": {"0": 0.5, "1": float("nan")}}}, "weight nan"),
            "a weight in words": ({"model.layers.0.mlp": {"0": {"0": 0.5, "1": "0.5"}}}, "'0.5'"),
            "a weight null": ({"model.layers.0.mlp": {"0": {"0": 0.5, "1": None}}}, "None"),
        }.items()
    },
    "groups apart": ({"keep": {"model.layers.2.mlp": [0, 1, 2, 6, 7]}}, "[3, 2]"),
}


@pytest.mark.parametrize("fault", FAULTY_FILES)
def test_each_fault_is_one_line(fault: str, tmp_path: Path) -> None:
    content, said = FAULTY_FILES[fault]
    assert said in refusal(written(tmp_path, content))


def test_the_file_is_named_where_it_cannot_be_read(tmp_path: Path) -> None:
    assert str(tmp_path / "none.json") in refusal(tmp_path / "none.json")
    assert str(tmp_path) in refusal(tmp_path)  # a folder
    (tmp_path / "image.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert "image.json" in refusal(tmp_path / "image.json")


def test_layers_are_checked_before_the_model(tmp_path: Path) -> None:
    """The shapes say more than "another model"."""
    message = refusal(written(tmp_path, {"keep": {"model.layers.0.mlp": [0, 9]}, "model_id": "other@00"}))
    assert "expert 9" in message


# ------------------------------------------------------------------------------------------- cuts in a row

Keep = dict[str, list[int]]
kept_ids = st.sets(st.integers(0, 9), min_size=1).map(sorted)
plans_of_three = st.fixed_dictionaries({"a": kept_ids, "b": kept_ids, "c": kept_ids})


@st.composite
def cuts(draw: st.DrawFn, before: Keep) -> Keep:
    """A cut of what ``before`` left, of some of its layers."""
    return {
        name: sorted(draw(st.sets(st.integers(0, len(ids) - 1), min_size=1)))
        for name, ids in before.items()
        if draw(st.booleans())
    }


def slow_cut(layers: Keep, keep: Keep) -> Keep:
    """Take the others out of each list, one after another from behind."""
    left = {name: list(ids) for name, ids in layers.items()}
    for name, places in keep.items():
        for place in reversed(range(len(left[name]))):
            if place not in places:
                del left[name][place]
    return left


@given(before=plans_of_three, data=st.data())
def test_two_cuts_are_one(before: Keep, data: st.DataObject) -> None:
    now = data.draw(cuts(before))
    whole = {name: list(range(10)) for name in before}
    assert compose(before, now) == slow_cut(slow_cut(whole, before), now)
    assert slow_cut(whole, compose(before, now)) == slow_cut(slow_cut(whole, before), now)


@given(before=plans_of_three, data=st.data())
def test_cuts_in_a_row_can_be_put_together_in_any_order(before: Keep, data: st.DataObject) -> None:
    then = data.draw(cuts(before))
    then = before | {name: list(range(len(ids))) for name, ids in before.items()} | then  # every layer is named
    last = data.draw(cuts(then))
    assert compose(compose(before, then), last) == compose(before, compose(then, last))


@given(keep=plans_of_three)
def test_a_cut_that_drops_nothing_changes_nothing(keep: Keep) -> None:
    assert compose(keep, {}) == compose(keep, {name: list(range(len(ids))) for name, ids in keep.items()}) == keep
    assert compose({name: list(range(10)) for name in keep}, keep) == keep


def test_cut_shapes_by_hand() -> None:
    cut = cut_shapes(SHAPES, {"model.layers.1.mlp": [1, 2, 5], "model.layers.2.mlp": [0, 1, 6, 7]})
    assert [shape.num_experts for shape in cut] == [4, 3, 4]
    assert [shape.group_size for shape in cut] == [4, 3, 2]
    assert [(shape.name, shape.index, shape.top_k) for shape in cut] == [(s.name, s.index, s.top_k) for s in SHAPES]
    assert cut_shapes(SHAPES, {}) == SHAPES


# ----------------------------------------------------------------------------------------------- agreement


@given(one=plans_of_three, other=plans_of_three)
def test_agreement_is_the_share_of_what_either_keeps(one: Keep, other: Keep) -> None:
    found = agreement(one, other)
    assert found == agreement(other, one)
    pairs = {(name, expert) for name, ids in one.items() for expert in ids}
    others = {(name, expert) for name, ids in other.items() for expert in ids}
    for name, value in found.items():
        mine, yours = ({pair for pair in all_ if name in (pair[0], "all")} for all_ in (pairs, others))
        assert value == float(Fraction(len(mine & yours), len(mine | yours)))
        assert (value == 1) == (mine == yours) and (value == 0) == (not mine & yours)
    assert found.keys() == {"a", "b", "c", "all"}


def test_agreement_by_hand() -> None:
    """Layer a: 0 1 2 and 1 2 3 share 2 of 4. Layer b: 0 and 1 share none of 2. Together 2 of 6."""
    one, other = {"a": [0, 1, 2], "b": [0]}, {"a": [1, 2, 3], "b": [1]}
    assert agreement(one, other) == {"a": 0.5, "b": 0.0, "all": pytest.approx(1 / 3)}


def test_agreement_of_layers_that_both_name() -> None:
    assert agreement({"a": [0], "b": [0]}, {"b": [0, 1], "c": [5]}) == {"b": 0.5, "all": 0.5}
    assert agreement({"a": [0]}, {"c": [5]}) == {"all": 1.0}
    assert agreement({"a": [], "b": [0]}, {"a": [], "b": [1]}) == {"a": 1.0, "b": 0.0, "all": 0.0}


def test_a_file_may_name_only_blocks_and_no_unknown_key(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"blocks": ["model.layers.1.mlp"]}')
    plan = load_plan(file)
    assert (plan.keep, plan.blocks) == ({"model.layers.1.mlp": []}, ["model.layers.1.mlp"])
    file.write_text('{"keep": {"model.layers.0.mlp": [0, 1]}, "block": ["model.layers.1.mlp"]}')
    with pytest.raises(InputError, match="Did you mean 'blocks'"):
        load_plan(file)
