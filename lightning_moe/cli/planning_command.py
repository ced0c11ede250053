"""PlanningCommand: the method of ``MoETrainer`` that is ``plan``."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_moe.cli.cluster import Cluster
from lightning_moe.cli.plan import PlanRequest, plan
from lightning_moe.cli.plan_table import show_plan
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.modules.causal_lm import MoECausalLM


class PlanningCommand(Trainer):
    """A Trainer that for ``plan`` runs nothing, and only says what devices are meant."""

    cluster: Cluster | None = None
    """The devices that ``plan`` is about, which need not be here; None for other commands."""

    def plan(
        self,
        model: MoECausalLM,
        datamodule: TextDataModule,
        out: str | None = None,
        ratio: float = PlanRequest.ratio,
        updates: int | None = None,
        finetune_tokens: int = PlanRequest.finetune_tokens,
        gpu: str | None = None,
        device_memory: float | None = None,
        flops: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Say what each job takes in memory and time, before anything is loaded.

        The model's config is all that is read: --model.path is a model folder, a config.json or a hub id. The devices
        that --trainer.devices, num_nodes, strategy and precision name need not be here. Batches are those of
        --data.batch_size and seq_len, the text is --data.samples windows.

        Args:
            model: The model.
            datamodule: How the text is cut into batches.
            out: Run folder; gets estimate.json. Default: only print.
            ratio: Share of the experts that are gone when the model is tuned.
            updates: Length of the search; default is that of `search`.
            finetune_tokens: Tokens that the model is tuned on.
            gpu: Name of the GPUs, such as H100, from which memory and speed are known. Default: those of this machine.
            device_memory: GiB of one device. Default: the GPU's; else this machine's RAM, shared by its processes.
            flops: Floating-point operations per second that one device reaches in this work. Default: 35% of the
                GPU's peak, or 70% of what this CPU does in a product of matrices.
            overwrite: Replace the estimate for another request in that folder.
        """
        assert self.cluster is not None
        request = PlanRequest(ratio, updates, finetune_tokens, gpu, device_memory, flops)
        show_plan(plan(self.cluster, model, datamodule, request, out, overwrite), out)
