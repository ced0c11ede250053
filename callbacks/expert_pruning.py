"""ExpertPruning: drop experts round by round while any model is trained."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_moe.callbacks.batches import Batches, batches_of, num_tokens, prepare
from lightning_moe.callbacks.hf_checkpoint import HFCheckpoint
from lightning_moe.callbacks.in_fit_cut import InFitCut, OptimizerChoice
from lightning_moe.callbacks.in_fit_measure import in_fit_measure
from lightning_moe.callbacks.round_log import RoundLog, state_of
from lightning_moe.callbacks.round_trigger import RoundTrigger, Unit
from lightning_moe.callbacks.scaled_rates import RoundCosine
from lightning_moe.criteria import Direction
from lightning_moe.errors import InputError
from lightning_moe.moe.layers import find_moe_layers, hugging_face_model, parameters_left
from lightning_moe.pruning.budget import Scope, make_plan
from lightning_moe.pruning.plan import compose
from lightning_moe.pruning.round_record import RoundRecord, make_record
from lightning_moe.pruning.schedule import Spacing, check_rounds, make_schedule, round_seed
from lightning_moe.search.in_memory import check_method, score_in_memory
from lightning_moe.search.presets import preset_of
from lightning_moe.stats.gradients import GRADIENT_MEMORY, check_gradient_memory


class ExpertPruning(Callback):
    """Prune the Hugging Face MoE inside a LightningModule, in one round or several, during a fit.

    A round scores the experts that are left on calibration text, drops the lowest, and gives the optimisers what is
    new, see ``InFitCut``: on one process the weights are cut at once, under DDP and ``moe_fsdp`` the routers see
    dropped experts no more. Each round is recorded in ``records``, in ``folder`` and in the logger under
    ``expert_pruning/``. A fit, validation or test from a checkpoint finds the model as it was, and the rounds done.

    Args:
        calibration: Batches to score on, with ``input_ids`` and, if padded, ``attention_mask``; see ``Batches``. All
            ranks are given the same, and share the work.
        ratio: Share of all experts that is gone after the last round.
        rounds: How many rounds, or the share gone after each, ascending to ``ratio``.
        method: Any criterion, or a search: ``diep``, ``diep-PRESET``.
        scope: ``layer`` drops the same number in each, ``global`` the lowest of all.
        direction: Which end of a criterion goes; default as its paper has it.
        floor: Fewest experts a layer keeps under global scope; default is what its router needs.
        spacing: Rounds of one size, or small first and last.
        unit: Of the moments below: optimiser ``steps`` or ``epochs`` ended, as the Trainer counts them, or ``tokens``
            seen, which add up over fits.
        start: Moment of the first round; 0 is the start of the fit.
        every: From the first round to the second.
        growth: Each further distance over the one before; 2 doubles the budget from round to round (MC-Suite).
        at: The moment of each round, in place of these three.
        optimizer: ``reset`` makes optimisers and schedulers anew after each round; ``carry`` keeps what they know.
        cosine: Multiply the learning rate, whatever the schedule makes of it, by a cosine from 1 down over each round.
        min_lr_ratio: Where that ends.
        evaluation: Batches to measure perplexity and load on before and after each cut and the training after it;
            null measures nothing.
        folder: Where ``rounds.jsonl`` goes.
        seed: Of random scores and searches.
        gradient_memory: GiB of summed gradients that a rank holds at once, for criteria on gradients.
    """

    def __init__(
        self,
        calibration: Batches,
        ratio: float = 0.5,
        rounds: int | Sequence[float] = 1,
        method: str = "reap-sum",
        scope: Scope = "layer",
        direction: Direction | None = None,
        floor: int | None = None,
        spacing: Spacing = "equal",
        unit: Unit = "steps",
        start: int = 0,
        every: int | None = None,
        growth: float = 1.0,
        at: Sequence[int] | None = None,
        optimizer: OptimizerChoice = "reset",
        cosine: bool = False,
        min_lr_ratio: float = 0.0,
        evaluation: Batches | None = None,
        folder: Path | str | None = None,
        seed: int = 0,
        gradient_memory: float = GRADIENT_MEMORY,
    ) -> None:
        check_method(method)
        check_gradient_memory("ExpertPruning: gradient_memory", gradient_memory)
        if direction is not None and preset_of(method) is not None:
            raise InputError(f"ExpertPruning: direction {direction}: {method} is a search, no criterion; leave it out.")
        for name, value, known in (
            ("optimizer", optimizer, ("reset", "carry")),
            ("scope", scope, ("layer", "global")),
            ("spacing", spacing, ("equal", "cosine")),
            ("direction", direction, ("min", "max", None)),
        ):
            if value not in known:
                raise InputError(f"ExpertPruning: {name} {value!r}: one of {', '.join(filter(None, known))}.")
        if not 0 <= min_lr_ratio <= 1:
            raise InputError(f"ExpertPruning: min_lr_ratio {min_lr_ratio}: between 0 and 1.")
        if min_lr_ratio and not cosine:
            raise InputError(f"ExpertPruning: min_lr_ratio {min_lr_ratio}: where a cosine ends; give cosine true.")
        self.schedule = make_schedule(ratio, rounds, spacing)
        self.trigger = RoundTrigger(len(self.schedule), unit, start, every, growth, at)
        if cosine and self.trigger.every is None:
            raise InputError(
                "ExpertPruning: a cosine over each round needs its length: give `every` or several in `at`."
            )
        self.calibration, self.evaluation = calibration, evaluation
        self.method, self.scope, self.direction, self.floor = method, scope, direction, floor
        self.optimizer, self.cosine = optimizer, cosine
        self.seed, self.gradient_memory = seed, gradient_memory
        self._log = RoundLog(None if folder is None else Path(folder))
        self._epochs, self._ended = 0, False
        self._cut, self._cosine = InFitCut(), RoundCosine(self._progress, min_lr_ratio)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.method, ratio=self.schedule.ratios[-1])

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._log.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._log.load_state_dict(state_dict)

    @property
    def records(self) -> list[RoundRecord]:
        """Of the rounds so far."""
        return self._log.records

    @property
    def keep(self) -> dict[str, list[int]]:
        """Kept experts of each layer, by their ids in the whole model."""
        return self._log.keep

    @property
    def tokens(self) -> int:
        """Trained on so far, over all ranks."""
        return self._log.tokens

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._cut.begin(trainer, pl_module)
        if stage == "fit":
            prepare((self.calibration, self.evaluation), trainer)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Not where a loop starts: with no step left the fit's never does, and the model is exported all the same.
        guests: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        state = state_of(self.state_key, checkpoint["callbacks"], [one.state_key for one in guests])
        if state is not None and state["whole"]:  # else it was saved before any fit
            self.load_state_dict(state)
            self._log.step = checkpoint["global_step"]
            self._cut.restore(hugging_face_model(pl_module, "ExpertPruning"), self._log.kept)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, "ExpertPruning")
        self._cut.check_unmasked(model)
        self._ended = False
        if not self._log.whole:
            self._log.whole = [layer.shape for layer in find_moe_layers(model)]
            check_rounds(self._log.whole, self.schedule, self.scope, self.floor)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: what a resumed fit knows is restored only after that, with some strategies all of it.
        model = hugging_face_model(pl_module, "ExpertPruning")
        found = [layer.shape.num_experts for layer in find_moe_layers(model)]
        left = [len(ids) for ids in self.keep.values()]
        if found != left:
            raise InputError(
                f"ExpertPruning: the model's layers have {found} experts, but this callback has pruned one down to "
                f"{left}; make a new callback for a new model."
            )

        self._log.begin_fit(trainer.global_step)
        self._epochs = trainer.current_epoch
        self._watch_optimizers(trainer)
        # Also what was due when a checkpoint was saved: Lightning ends no epoch again whose last batch was trained.
        if self.trigger.due(len(self.records), self._now):
            self._round(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with nullcontext() if self.trigger.unit == "tokens" else suppress(TypeError):
            tokens = torch.tensor(num_tokens(batch, "ExpertPruning"), device=pl_module.device)
            self._log.tokens += int(trainer.strategy.reduce(tokens, reduce_op="sum"))
        if trainer.global_step == self._log.step:
            return  # gradients are being accumulated, and would be lost
        self._log.step = trainer.global_step
        if self.trigger.unit != "epochs" and self.trigger.due(len(self.records), self._now):
            self._round(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs = trainer.current_epoch + 1
        if self.trigger.unit == "epochs" and self.trigger.due(len(self.records), self._now):
            self._round(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        self._log.end_round(self._measured(pl_module))
        if (done := len(self.records)) < len(self.schedule):
            rank_zero_warn(f"ExpertPruning: the fit ended after {done} of {len(self.schedule)} rounds.")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ended:
            return
        # With no step left, Lightning neither starts nor ends a training; by now most strategies have taken the model
        # off its device.
        found = pl_module.device
        trainer.strategy.model_to_device()
        self.on_train_end(trainer, pl_module)
        if pl_module.device != found:
            pl_module.to(found)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._cosine.end()
        self._cut.end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @property
    def _now(self) -> float:
        return {"steps": self._log.step, "tokens": self.tokens, "epochs": self._epochs}[self.trigger.unit]

    def _round(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = hugging_face_model(pl_module, "ExpertPruning")
        turn, before, seconds = len(self.records) + 1, self.keep, {}
        measured = {"before_prune": self._measured(pl_module)}
        self._log.end_round(measured["before_prune"])
        start = time.perf_counter()
        with trainer.precision_plugin.forward_context():
            seed, batches = round_seed(self.seed, turn), batches_of(self.calibration)
            scores = score_in_memory(model, batches, self.method, self.direction, seed, self.gradient_memory)
        seconds["estimate"] = time.perf_counter() - start
        plan = make_plan(scores, self.schedule.ratios[turn - 1], self.scope, self.floor, whole=self._log.whole)
        guests: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in guests:
            if isinstance(callback, HFCheckpoint):
                callback.follow(trainer, pl_module)  # what has been saved is of the weights before the cut
        keep = compose(before, plan.keep)
        self._cut.apply(trainer, model, plan.keep, self.optimizer)
        if self.optimizer == "reset":
            self._watch_optimizers(trainer)
        seconds["prune"] = time.perf_counter() - start - seconds["estimate"]
        measured["after_prune"] = self._measured(pl_module)
        self._log.begin_round(
            make_record(
                before,
                keep,
                scores.scores,
                measured,
                seconds,
                round=turn,
                ratio=self.schedule.ratios[turn - 1],
                method=self.method,
                parameters=parameters_left(model),
                made_by=plan.made_by | {"step": trainer.global_step},
            )
        )
        figures = {"experts": sum(map(len, keep.values())), "ratio": self.schedule.ratios[turn - 1]}
        figures |= {f"perplexity_{name}": one["perplexity"]["all"] for name, one in measured.items() if one}
        said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        pl_module.print(f"ExpertPruning: round {turn} of {len(self.schedule)} at step {trainer.global_step}: {said}")
        named = {f"expert_pruning/{name}": value for name, value in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    def _measured(self, pl_module: LightningModule) -> dict[str, Any] | None:
        if self.evaluation is None:
            return None
        with pl_module.trainer.precision_plugin.forward_context():
            return in_fit_measure(hugging_face_model(pl_module, "ExpertPruning"), batches_of(self.evaluation))

    def _watch_optimizers(self, trainer: Trainer) -> None:
        if self.cosine:
            self._cosine.watch(trainer.optimizers)

    def _progress(self) -> float:
        return self.trigger.progress(len(self.records), self._now)
