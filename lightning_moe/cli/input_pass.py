"""The pass that gives Wanda the norms of all inputs; a killed one goes on from its last save."""

from __future__ import annotations

import time

from lightning.pytorch import Trainer
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.callbacks.summing_pass import SummingPass
from lightning_moe.cli.request import refuse_less_text
from lightning_moe.cli.run_folder import RunFolder
from lightning_moe.cli.text_pass import start_at, watch_text
from lightning_moe.data.datamodule import TextDataModule
from lightning_moe.evaluation.perplexity import check_vocabulary
from lightning_moe.files import remove
from lightning_moe.modules.causal_lm import MoECausalLM
from lightning_moe.moe.checkpoints import same_model
from lightning_moe.moe.ranks import check_shared
from lightning_moe.moe.semi_structured import InputNorms
from lightning_moe.stats.input_norms import VERSION, InputSums, StoredNorms, load_norms

FILE = "input_norms.safetensors"


class InputObservation(SummingPass[InputSums]):
    """Sums what every matrix of every expert is given; the result is in ``norms``."""

    norms: InputNorms

    @override
    def _begun(self, model: PreTrainedModel) -> InputSums:
        return InputSums(model)

    @override
    def _ended(self, running: InputSums) -> None:
        self.norms = running.norms()


def input_norms(trainer: Trainer, model: MoECausalLM, data: TextDataModule, run: RunFolder) -> StoredNorms:
    """The norms of this model's inputs on this text: from the run folder if it holds them, else from one pass.

    Every rank must call it. It is a pass of its own, at the cost of a forward:
    only this rule asks for norms, so the statistics that all criteria share are not made larger, nor that pass slower,
    for it.
    """
    data.setup("predict")
    file, identity, precision = run.folder / FILE, run.request["model_id"], run.request["precision"]
    found = load_norms(file) if file.is_file() else None
    wanted = data.text.fingerprint, precision
    if found is not None and same_model(found.model_id, identity) and (found.data_fingerprint, found.dtype) == wanted:
        return found
    refuse_less_text(trainer, "limit_predict_batches")
    model.prepare(trainer)
    partial = run.partial(input_norms=VERSION, batch_size=data.batch_size, world_size=trainer.world_size)
    check_shared(partial)
    check_vocabulary(model, data)
    started = time.perf_counter()
    observation = InputObservation(partial, start_at(trainer, data))
    watch_text(trainer, model, data, observation, partial)
    seconds = round(time.perf_counter() - started, 3)
    found = StoredNorms(identity, data.text.fingerprint, precision, observation.norms, seconds)
    if trainer.is_global_zero:
        found.save(file)
        remove(partial)
    trainer.strategy.barrier()
    return found
