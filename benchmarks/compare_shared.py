"""compare-shared: the scores of twelve criteria as ``compare`` makes them over twelve runs that each make their own.

From the start to the scores, on the bundled model: text, model, observation. Export and evaluation are left out on
both sides, as is starting a process; and so are the stable ranks of the weights, for `wsr`, which take five times as
long as the pass over this short text. Every command makes them, which would lower the ratio; made by one run of the
twelve alone, they would raise it to about 0.3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from benchmarks.ratios import QUIET, median_ratio, report
from lightning_moe.cli.job import Job
from lightning_moe.cli.main import quiet
from lightning_moe.cli.methods import get_method
from lightning_moe.cli.score import observe_into
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import model_id
from lightning_moe.pruning.scores import ExpertScores
from lightning_moe.stats.store import ModelStats

GOAL = 0.25
METHODS = ("ews", "rwn", "ewn", "euf", "ecc", "evc", "ets", "eas", "eae", "eao", "ean", "reap")
"""MC-Suite's forward criteria but one, and REAP."""

REFERENCE = Path(__file__).parents[1] / "lightning_moe" / "reference"
WINDOWS = 16
"""Of 256 tokens."""


def scores(names: Sequence[str]) -> dict[str, ExpertScores]:
    """Of these methods, by one model, one text and one pass."""
    path = str(REFERENCE / "model")
    trainer = Trainer(
        logger=False,
        use_distributed_sampler=False,
        **QUIET,
    )
    data = TextDataModule(str(REFERENCE / "text" / "calibration"), tokenizer=path, samples=WINDOWS)
    model = MoECausalLM(path, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def observe(model: MoECausalLM, gradients: bool) -> ModelStats:
            where = place / "stats.safetensors", place / "partial"
            return observe_into(trainer, model, data, *where, model_id(path), "float32", stable_ranks=False)

        job = Job(trainer, model, data, observe)
        return {name: get_method(name).run(job, 0.5, None, place / name) for name in names}


def main(repeats: int = 3) -> None:
    quiet()
    scores(METHODS[:1])  # warm-up
    found: dict[str, dict[str, ExpertScores]] = {}
    ratio = median_ratio(
        lambda: found.update(ours=scores(METHODS)),
        lambda: found.update(floor={name: scores([name])[name] for name in METHODS}),
        repeats,
        warmup=0,
    )
    assert {name: one.as_json() for name, one in found["ours"].items()} == {
        name: one.as_json() for name, one in found["floor"].items()
    }, "other scores"
    report("compare-shared", ratio, GOAL)


if __name__ == "__main__":
    main()
