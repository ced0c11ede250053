"""Methods that prune weights inside of experts, two of every four: ``prune`` by one, and the cell of ``compare``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_moe.cli.cut import ROUND_FILES, Cut, reduction, target_of
from lightning_moe.cli.input_pass import input_norms
from lightning_moe.cli.job import Job
from lightning_moe.cli.methods import Method, get_method
from lightning_moe.cli.request import asked_data, asked_model, checkpoint_size, model_path, seed
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.skipping import Skipping
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import layer_shapes
from lightning_moe.moe.semi_structured import PATTERN, PATTERN_RATIO, Pattern, zero_in_model
from lightning_moe.moe.semi_structured_disk import check_prunable, zero_in_checkpoint


def prune_weights(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    out: str,
    cut: Cut,
    sources: Mapping[str, str | None],
    overwrite: bool,
    skipping: Skipping,
    merge: bool,
) -> dict[str, Any] | None:
    """Write model/, with half of the experts' weights zero; Wanda also writes the norms of their inputs.

    ``sources`` are the options of ``prune`` that name one. Text is all that is looked at, and by Wanda alone.
    """
    method, path = get_method(cut.method), model_path(model)
    _check_options(method, cut, sources, skipping, merge)
    shapes = layer_shapes(path)
    check_prunable(path)
    asked = asked_model(trainer, model) | {"method": method.name}
    asked |= asked_data(data) if method.needs_text else {}
    asked |= {"seed": seed()} if method.seeded else {}
    target = target_of(out, path)
    run = RunFolder(out, "prune", asked, overwrite)
    if run.finished and target.is_dir():
        return run.finished
    pattern, fingerprint, _ = _pattern(trainer, model, data, run, method, seed())
    if not trainer.is_global_zero:
        return None
    model.release()  # from here on it is from file to file
    replaced = (run.folder / "prune.json").is_file()  # of a prune that dropped experts, perhaps
    scores = () if (run.folder / "score.json").is_file() else ("scores.json",)
    run.begin(*(("plan.json", *scores, *ROUND_FILES) if replaced else ()))
    started = time.perf_counter()
    zeros = zero_in_checkpoint(path, pattern, target)
    return run.finish(
        {
            "model_id": asked["model_id"],
            "data_fingerprint": fingerprint,
            **_made_by(method, pattern),
            **reduction(path, target, shapes, {}),
            "nonzero_parameters": checkpoint_size(str(target))["parameters"] - zeros,
            "save_seconds": round(time.perf_counter() - started, 3),
            "world_size": trainer.world_size,
        }
    )


def zeroed_model(job: Job, run: RunFolder, method: Method, cell_seed: int | None) -> tuple[MoECausalLM, dict[str, Any]]:
    """The model with half of its experts' weights zero, in memory, and what a cell of ``compare`` says of it.

    The seconds are those of choosing weights: of the pass over the text, whenever that was made, and of the zeros.
    """
    pattern, _, pass_seconds = _pattern(job.trainer, job.model, job.data, run, method, cell_seed or 0)
    model = job.whole_model_to_change()
    started = time.perf_counter()
    zeros = zero_in_model(model.network, pattern)
    seconds = pass_seconds + time.perf_counter() - started
    return model, {
        "nonzero_parameters": checkpoint_size(model_path(model))["parameters"] - zeros,
        "method_seconds": round(seconds, 3),
        "comparable": True,
        "made_by": _made_by(method, pattern),
    }


def _pattern(
    trainer: Trainer,
    model: MoECausalLM,
    data: TextDataModule,
    run: RunFolder,
    method: Method,
    drawn_by: int,
) -> tuple[Pattern, str | None, float]:
    """Which weights go, the text that was looked at, and the seconds of the pass over it; every rank must call it."""
    assert method.weights is not None
    if not method.needs_text:
        return Pattern(method.weights, drawn_by if method.seeded else 0), None, 0.0
    found = input_norms(trainer, model, data, run)
    pattern = Pattern(method.weights, norms=found.norms)
    unused = pattern.experts_without_inputs()
    if unused and trainer.is_global_zero:
        print(f"note: {method.name}: {unused} experts saw no token of the text; their weights go by magnitude.")
    return pattern, found.data_fingerprint, found.seconds


def _made_by(method: Method, pattern: Pattern) -> dict[str, Any]:
    made = {"method": method.name, "ratio": PATTERN_RATIO, "pattern": PATTERN}
    made |= {"seed": pattern.seed} if method.seeded else {}
    return made | ({"experts_without_tokens": pattern.experts_without_inputs()} if method.needs_text else {})


def _check_options(
    method: Method, cut: Cut, sources: Mapping[str, str | None], skipping: Skipping, merge: bool
) -> None:
    """Refuse, in one line, what says which experts to drop: none is."""
    if cut.ratio != PATTERN_RATIO:
        raise InputError(
            f"--ratio {cut.ratio}: {method.name} sets two of every four weights to zero, which is {PATTERN_RATIO}; "
            "leave it out."
        )
    given: dict[str, object] = {
        "--scope": None if cut.scope == Cut.scope else cut.scope,
        "--direction": cut.direction,
        "--floor": cut.floor,
        "--merge": merge or None,
        "--skipping": skipping,
        **{option: file for option, file in sources.items() if option != "--data.path"},
    }
    for option, value in given.items():
        if value is not None:
            said = str(value).lower() if isinstance(value, bool) else value
            remedy = "give --data.path instead" if option == "--stats" and method.needs_text else "leave it out"
            raise InputError(
                f"{option} {said}: {method.name} drops no expert, but half of the weights of each; {remedy}."
            )


def check_weight_cells(methods: Sequence[Method], path: str, quantize: str | None = None) -> None:
    """Raise ``InputError`` where one of ``methods`` prunes weights, and the model's cannot be, or not as packed."""
    names = sorted({method.name for method in methods if method.weights is not None})
    if names:
        check_prunable(path)
    if names and quantize is not None:
        raise InputError(
            f"--methods: {' and '.join(names)} set weights to zero, which experts in {quantize} cannot be; leave out "
            "--trainer.strategy.quantize."
        )
