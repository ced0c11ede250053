"""The grid of a comparison: its cells, and what is refused before any of them is begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from lightning_moe.cli.methods import Method, get_method
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.errors import InputError, did_you_mean
from lightning_moe.moe.semi_structured import PATTERN_RATIO
from lightning_moe.pruning.budget import Scope
from lightning_moe.pruning.schedule import RoundSchedule
from lightning_moe.report.comparison import FULL

MOST_ROUNDS = 16
"""Equal rounds tried where none are asked for."""


Strategy = Literal["one-shot", "iterative", "lottery", "one-shot-tuned"]
"""One cut; rounds; rounds with tuning; one cut, then tuning on as many tokens as the lottery has had by then."""

TUNED = "tuned"
"""The strategy of the control that drops nothing and is tuned as the lottery is."""


@dataclass(frozen=True)
class Cell:
    """One way to prune the model, or, without a method, to tune it."""

    method: Method | None
    scope: Scope
    ratio: float
    seed: int | None
    """None where the result depends on none."""
    strategy: str = "one-shot"
    schedule: RoundSchedule | None = None
    """Of the run that the cell is one moment of; None for one cut."""
    recipe: str = ""
    """Stands for the schedule, and for what else decides the result where something is tuned or searched."""

    @property
    def method_name(self) -> str:
        return FULL if self.method is None else self.method.name

    @property
    def settings(self) -> dict[str, Any]:
        """In plain values: cells with equal ones are the same work."""
        return {
            "method": self.method_name,
            "strategy": self.strategy,
            "scope": None if self.method is None or self.method.weights else self.scope,
            "ratio": self.ratio,
            "seed": self.seed,
        } | ({"recipe": self.recipe} if self.recipe else {})

    def made(self, row: Mapping[str, Any]) -> bool:
        """Whether what is in ``row`` is this very work; one without a recipe is other work than one with."""
        return all(row.get(name) == value for name, value in {"recipe": None, **self.settings}.items())

    @property
    def title(self) -> str:
        """For people."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        if self.method is None:
            return f"full model tuned as at {100 * self.ratio:g}%{seed}"
        if self.method.weights is not None:
            return f"{self.method.name}, {100 * self.ratio:g}% of the experts' weights{seed}"
        strategy = "" if self.strategy == "one-shot" else f", {self.strategy}"
        return f"{self.method.name}{strategy}, {self.scope}, {100 * self.ratio:g}%{seed}"

    @property
    def file_name(self) -> str:
        return f"{self._words}-{self.ratio!r}{self._seed_word}"

    @property
    def run_name(self) -> str:
        """Of the rounds that the cell is one moment of: equal names are the same run."""
        ratio = f"-{self.ratio!r}" if self.strategy == "one-shot-tuned" else ""
        return f"{self._words}{ratio}{self._seed_word}-{self.recipe}"

    @property
    def _words(self) -> str:
        if self.method is None:
            return f"{FULL}-{self.strategy}"
        if self.method.weights is not None:
            return self.method.file_name
        strategy = "" if self.strategy == "one-shot" else f"-{self.strategy}"
        return f"{self.method.file_name}{strategy}-{self.scope}"

    @property
    def _seed_word(self) -> str:
        return "" if self.seed is None else f"-seed{self.seed}"


def make_grid(
    methods: Sequence[str],
    ratios: Sequence[float],
    scopes: Sequence[str],
    seeds: int,
    first_seed: int,
    strategies: Sequence[str] = ("one-shot",),
    options: RoundOptions | None = None,
    ranks: int = 1,
    clipping: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Every method, with its seeds, by every strategy, at every ratio and scope; each once.

    A method may name its scope, as in ``diep@global``, and then has that one alone. Strategies that tune bring a
    control: the full model, tuned as the lottery is. ``ranks`` and ``clipping`` (see ``clipping``) are part of what is
    learned on them alone. Raises ``InputError`` for unknown names.
    """
    for option, values in (("methods", methods), ("ratios", ratios), ("scopes", scopes), ("strategies", strategies)):
        if not values:
            raise InputError(f"--{option}: give at least one.")
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: at least 1 is needed.")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise InputError(
                f"--ratios {ratio}: the fraction of experts to drop must lie between 0 and 1, both excluded."
            )
    chosen = [_named(name) for name in methods]
    known = [_scope(name) for name in dict.fromkeys(scopes)]
    scopes_of = [_own_scopes(name, method, known) for name, method in zip(methods, chosen, strict=True)]
    ratios = list(dict.fromkeys(ratios))
    options = options or RoundOptions()
    chosen_strategies = list(dict.fromkeys(map(_strategy, strategies)))
    if options.tokens and not any(map(_tunes, chosen_strategies)):
        raise InputError(f"--finetune_tokens {options.tokens}: none of --strategies {list(strategies)} tunes.")
    if options.rounds != 1 and chosen_strategies == ["one-shot"]:
        raise InputError(f"--rounds {options.rounds}: --strategies {list(strategies)} has but one cut.")
    _check_one_cut(chosen, ratios, chosen_strategies)
    plans = {name: _schedules(name, ratios, options) for name in chosen_strategies}
    all_seeds = list(range(first_seed, first_seed + seeds))
    tuning = {**options.asked_tuning(), **(clipping or {})} if options.tokens else {}
    cells = [
        Cell(method, scope, ratio, seed, strategy, plan[ratio], _recipe(plan[ratio], tuning, ranks, method))
        for method, own in zip(chosen, scopes_of, strict=True)
        for strategy, plan in plans.items()
        for seed in (all_seeds if method.seeded or _tunes(strategy) else [None])
        for ratio in (ratios if method.weights is None else [PATTERN_RATIO])
        for scope in (own if method.weights is None else own[:1])
    ]
    if any(_tunes(strategy) for strategy in plans):
        plan = _schedules("lottery", ratios, options)
        cells += [
            Cell(None, "layer", ratio, seed, TUNED, plan[ratio], _recipe(plan[ratio], tuning, ranks, None))
            for seed in all_seeds
            for ratio in ratios
        ]
    return list({cell.file_name: cell for cell in cells}.values())


def _check_one_cut(methods: Sequence[Method], ratios: Sequence[float], strategies: Sequence[Strategy]) -> None:
    """Refuse rounds of what is one cut, and ratios without the one of methods that have no other."""
    names = " and ".join(method.name for method in methods if method.weights is not None)
    if names and PATTERN_RATIO not in ratios:
        raise InputError(
            f"--ratios {list(ratios)}: by {names} two of every four weights of all experts become zero, which is "
            f"{PATTERN_RATIO}; name that too."
        )
    for method in methods if list(strategies) != ["one-shot"] else ():
        if method.one_cut is not None:
            raise InputError(
                f"--methods {method.name}: it {method.one_cut}, in one cut: compare it by --strategies '[one-shot]', "
                "in the same --out if you like."
            )


def _tunes(strategy: str) -> bool:
    return strategy in ("lottery", "one-shot-tuned")


def _schedules(strategy: str, ratios: Sequence[float], options: RoundOptions) -> dict[float, RoundSchedule | None]:
    """The run that gives each ratio. One run passes through all of them, but for one cut, which needs one each."""
    if strategy == "one-shot":
        return dict.fromkeys(ratios)
    if _tunes(strategy) and not options.tokens:
        raise InputError(f"--strategies: {strategy} tunes; say on how many tokens first with --finetune_tokens.")
    whole = _passing(ratios, options if _tunes(strategy) else replace(options, tokens=0))
    if strategy == "one-shot-tuned":
        return {ratio: RoundSchedule((ratio,), (sum(whole.up_to(ratio).tokens),)) for ratio in ratios}
    return dict.fromkeys(ratios, whole)


def _passing(ratios: Sequence[float], options: RoundOptions) -> RoundSchedule:
    """The rounds asked for, if they pass through every ratio; with none asked, the fewest equal ones that do."""
    counts = [options.rounds] if options.rounds != 1 else range(min(len(ratios), MOST_ROUNDS), MOST_ROUNDS + 1)
    for rounds in counts:
        schedule = replace(options, rounds=rounds).schedule(max(ratios))
        near = {ratio: min(schedule.ratios, key=lambda one: abs(one - ratio)) for ratio in ratios}
        if all(abs(one - ratio) < 1e-6 for ratio, one in near.items()):
            exact = {one: ratio for ratio, one in near.items()}
            return RoundSchedule(tuple(exact.get(one, one) for one in schedule.ratios), schedule.tokens)
    found = ", ".join(f"{one:.4g}" for one in schedule.ratios)
    raise InputError(
        f"--ratios {list(ratios)}: the rounds pass through {found}, not through each of these; give --rounds as a list "
        "that holds them."
    )


def _recipe(schedule: RoundSchedule | None, tuning: Mapping[str, Any], ranks: int, method: Method | None) -> str:
    made: dict[str, Any] = {}
    tuned = schedule is not None and any(schedule.tokens)
    if schedule is not None:
        made["schedule"] = [schedule.ratios, schedule.tokens]  # however it was asked for
    if tuned:
        made |= tuning
    if ranks > 1 and (tuned or (method is not None and method.batchwise)):
        made["world_size"] = ranks  # a step takes a batch from each
    if not made:
        return ""
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:12]


def _strategy(name: str) -> Strategy:
    strategies = get_args(Strategy)
    if name not in strategies:
        raise InputError(
            f"--strategies: Unknown strategy '{name}'.{did_you_mean(name, strategies)} Known: {', '.join(strategies)}."
        )
    return cast(Strategy, name)


def _named(name: str) -> Method:
    try:
        return get_method(name.partition("@")[0], get_args(Scope))
    except InputError as error:
        raise InputError(f"--methods: {error}") from error


def _own_scopes(name: str, method: Method, scopes: Sequence[Scope]) -> Sequence[Scope]:
    """The one that stands behind the method's name, or those that are asked for and it has an answer for."""
    _, at, scope = name.partition("@")
    asked = [_scope(scope, f"--methods {name}")] if at else scopes
    own = [one for one in asked if method.scope in (None, one)]
    if not own:
        method.check_scope(asked[0])
    return own


def _scope(name: str, option: str = "--scopes") -> Scope:
    scopes = get_args(Scope)
    if name not in scopes:
        raise InputError(f"{option}: Unknown scope '{name}'.{did_you_mean(name, scopes)} Known: {', '.join(scopes)}.")
    return cast(Scope, name)
