"""MoETrainer: Lightning's Trainer; each of its methods is a command. Here those that decide which experts go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_moe.cli.cut import Cut
from lightning_moe.cli.display import show
from lightning_moe.cli.lottery import prune_in_rounds
from lightning_moe.cli.measuring_commands import MeasuringCommands
from lightning_moe.cli.planning_command import PlanningCommand
from lightning_moe.cli.prune import prune
from lightning_moe.cli.recovery import NEXT_TOKEN, Recovery
from lightning_moe.cli.round_options import RoundOptions
from lightning_moe.cli.score import score
from lightning_moe.cli.search import SearchRequest, search
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.errors import InputError, first_line
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.pruning.schedule import Spacing
from lightning_moe.search.diep import Score
from lightning_moe.search.objective import Target
from lightning_moe.search.relaxation import Relaxation
from lightning_moe.strategies import check_strategy


class MoETrainer(PlanningCommand, MeasuringCommands):
    """Lightning's Trainer; how and where to run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_strategy(kwargs.get("strategy"))
        # Our loaders know their rank, so no sampler may be replaced.
        try:
            super().__init__(*args, use_distributed_sampler=False, **kwargs)
        except (ValueError, TypeError) as error:  # a name or a number of devices that Lightning does not know
            raise InputError(f"--trainer: {first_line(error)}") from error

    def score(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        gradients: bool = False,
        similarity_tokens: int = 0,
        overwrite: bool = False,
    ) -> None:
        """Observe the model on text once and score its experts by every criterion.

        Args:
            model: The model.
            datamodule: The calibration text.
            out: Run folder; gets stats.safetensors, scores.json, findings.json (rank correlation of criteria, how often
                experts work, how alike they are) with figures/findings.png, and summary.json.
            gradients: Score by gradients too (egs ege ego egn), which takes passes of forward and backward; as many as
                --model.gradient_memory makes of it. Results that are there already get them added.
            similarity_tokens: Compare all experts, of one layer and of two, by their outputs on so many tokens, such as
                512 (CKA, as DiEP Fig. 1), in findings.json and figures/inter_layer.png; 0 does not. Results that are
                there already get it added.
            overwrite: Replace the results of another request in that folder.
        """
        show(out, score(self, model, datamodule, out, overwrite, gradients, similarity_tokens))

    def search(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        ratio: float = Cut.ratio,
        floor: int | None = None,
        preset: str = SearchRequest.preset,
        relaxation: Relaxation | None = None,
        task: Literal["ce", "kl", "none"] | None = None,
        target: Target | None = None,
        relative: bool | None = None,
        weight: float | None = None,
        pressure: float | None = None,
        lr: float | None = None,
        min_lr_ratio: float | None = None,
        optimizer: Literal["adam", "sgd"] | None = None,
        schedule: str | None = None,
        learn_alpha: bool | None = None,
        betas: str | None = None,
        score: Score | None = None,
        updates: int | None = None,
        accumulate: int | None = None,
        check_every: int = SearchRequest.check_every,
        patience: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Learn which experts matter by gradient (DiEP): alpha for every expert, beta for every layer.

        The model's own weights do not change. What is not given is as the preset has it.

        Args:
            model: The model.
            datamodule: The calibration text.
            out: Run folder; gets scores.json, plan.json, importance.json, figures/ and summary.json.
            ratio: Fraction of the experts that plan.json drops, in one order over all layers.
            floor: Fewest experts a layer keeps; default is what its router needs (top_k).
            preset: default; paper (the formulas as printed); or a row of the paper's ablation: alpha, beta-frequency,
                1:2, 2:1, 3:1, random.
            relaxation: How the gates enter: on the router's choice, on all experts by the router's full softmax, or
                on all experts without the router (Eq. 5 as printed).
            task: Loss of the student: next-token cross entropy, KL divergence from the full model, or none.
            target: Where the student is compared with the full model: what its output head is given, or gives.
            relative: Compare by squared distance over the full model's square; false is a plain norm.
            weight: Of that comparison in the loss (lambda).
            pressure: Of the mean gate in the loss.
            lr: Learning rate of alpha and beta.
            min_lr_ratio: What a cosine ends at, as a fraction of lr; 1 keeps it constant.
            optimizer: Of alpha and beta.
            schedule: Updates of alpha and of beta in turn, as a:b.
            learn_alpha: False keeps all experts of a layer alike.
            betas: learned, fixed, a:b for first and second half of the layers, or random.
            score: E softmax(alpha) beta (gate), alpha beta (raw), or beta times how often an expert is picked.
            updates: Length of the search.
            accumulate: Batches per update.
            check_every: Updates between two looks at the plan.
            patience: Stop when so many looks in a row found the same plan; default never.
            overwrite: Replace the results of another request in that folder.
        """
        changes: dict[str, Any] = {
            "relaxation": relaxation,
            "task": task,
            "target": target,
            "relative": relative,
            "weight": weight,
            "pressure": pressure,
            "lr": lr,
            "min_lr_ratio": min_lr_ratio,
            "optimizer": optimizer,
            "schedule": schedule,
            "learn_alpha": learn_alpha,
            "betas": betas,
            "score": score,
            "updates": updates,
            "accumulate": accumulate,
        }
        request = SearchRequest(ratio, floor, preset, changes, check_every, patience)
        show(out, search(self, model, datamodule, out, request, overwrite))

    def prune(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str,
        method: str = Cut.method,
        ratio: float = Cut.ratio,
        scope: Literal["layer", "global"] = Cut.scope,
        direction: Literal["min", "max"] | None = None,
        floor: int | None = None,
        stats: str | None = None,
        scores: str | None = None,
        plan: str | None = None,
        merge: bool = False,
        skipping: bool | Literal["naee"] | None = None,
        rounds: int | Sequence[float] = 1,
        spacing: Spacing = "equal",
        finetune_tokens: int = 0,
        finetune_growth: float = 2.0,
        finetune_path: str | None = None,
        finetune_lr: float | None = None,
        recovery: Recovery = NEXT_TOKEN,
        overwrite: bool = False,
    ) -> None:
        """Drop the experts that matter least and write the smaller checkpoint.

        Works from text (observes first), from the statistics or the scores of an earlier run, or from a plan. Several
        rounds estimate anew on what the rounds before left; with --finetune_tokens the model is tuned after each
        (MoE Lottery), and --data.val_path is what perplexity and load are measured on.

        Args:
            model: The model.
            datamodule: The calibration text.
            out: Run folder; gets plan.json, model/, summary.json, and scores.json and stats.safetensors, or with rounds
                rounds.jsonl and figures/.
            method: What scores the experts: a criterion (ews rwn wsr ewn euf ecc evc ets eas eae eao ean egs ege ego
                egn reap reap-sum man msan seer trimming random); a search, diep or diep-PRESET as `search` has it, or
                over sets of experts in each layer, naee or naee-progressive; the loss without each expert, scan; what
                merges experts (m-smoe s-smoe); what drops whole layers, with --scope global: layer-drop MoE blocks,
                block-drop decoder layers; or what drops nothing and sets two of every four weights of each expert to
                zero (2:4-random 2:4-magnitude 2:4-wanda), always half of them.
            ratio: Fraction of the experts to drop.
            scope: Drop the same number in each layer, or the lowest of all layers.
            direction: Drop the experts with the least or the most of the criterion; default as its paper has it.
            floor: Fewest experts a layer keeps under global scope; default is what its router needs (top_k).
            stats: A stats.safetensors (or the run folder that holds it) to use instead of text.
            scores: A scores.json (or the run folder that holds it) to use instead of text: of a search, or of the
                method that is asked.
            plan: A plan.json (or the run folder that holds it) to apply as it is.
            merge: Average each dropped expert into the kept one of its layer whose outputs are most like its own (CKA),
                instead of throwing it away; weights by the softmax of that likeness, as DiEP, App. A.5, and neurons
                in the order that fits best.
            skipping: Let the new model skip, token by token, experts that matter little beside the first: true for
                the rule of DiEP, naee for that of NAEE; false never. Default: as the model pruned does. The tables
                for it are stored in any case, unless the source is a plan and the model pruned has none.
            rounds: How many rounds reach the ratio; or a list of the shares of experts gone after each.
            spacing: Rounds of one size, or small ones first and last (cosine).
            finetune_tokens: Tokens to tune on after the first round; 0 does not tune.
            finetune_growth: The tokens of a round over those of the round before.
            finetune_path: Text to tune on; default is the calibration text, all of it.
            finetune_lr: Highest learning rate; default for Mixtral 8x7B 1e-6 (router-kd 5e-5), for smaller models more.
            recovery: What that tuning is.
            overwrite: Replace the results of another request in that folder.
        """
        cut = Cut(method, ratio, scope, direction, floor)
        options = RoundOptions(rounds, spacing, finetune_tokens, finetune_growth, finetune_path, finetune_lr, recovery)
        if options.asked_for:
            given = {"--stats": stats, "--scores": scores, "--plan": plan, "--merge": merge, "--skipping": skipping}
            refused = [name for name, value in given.items() if value not in (None, False)]
            if refused:
                raise InputError(
                    f"{', '.join(refused)}: not with rounds or tuning, which estimate on text; leave it out."
                )
            show(out, prune_in_rounds(self, model, datamodule, out, cut, options, overwrite))
            return
        options.check()
        show(out, prune(self, model, datamodule, out, cut, stats, scores, plan, overwrite, skipping, merge))
