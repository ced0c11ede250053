"""Steps of the commands, run on a model without content, to see what each holds beside the weights."""

# E experts, H model width, T tokens, K experts per token

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.callbacks.router_rebalance import Trained, trained_parameters
from lightning_moe.modules.causal_lm import MoECausalLM, next_token_loss
from lightning_moe.moe.checkpoints import new_model
from lightning_moe.moe.experts import IMPLEMENTATION, ExpertHooks, expert_hooks
from lightning_moe.moe.layer_inputs import LayerInputs
from lightning_moe.moe.layer_passages import StepBytes, trace_step
from lightning_moe.moe.layers import UNPACK, find_moe_layers
from lightning_moe.moe.live_bytes import LiveBytes, imagined
from lightning_moe.moe.non_uniform import stacked_parameters
from lightning_moe.moe.quantisation import Quantisation
from lightning_moe.moe.surgery import keep_experts
from lightning_moe.moe.weights import weights_of
from lightning_moe.search.diep import DiEPSearch
from lightning_moe.stats.gradients import GradientSums
from lightning_moe.stats.input_norms import InputSums
from lightning_moe.stats.observation import Observation
from lightning_moe.stats.weights import weight_stats

Backward = Callable[[Tensor], None]

PACKED_BYTES = {"nf4": 0.5, "int8": 1.0}
"""Of a packed weight, its scale aside."""


@dataclass(frozen=True)
class Batch:
    """What a rank is given at once, and how it computes."""

    windows: int
    seq_len: int
    autocast: torch.dtype | None = None
    """Type it computes in, where that is not the type of the weights."""
    recompute: bool = False
    """Whether activations of decoder layers are computed anew in the backward pass."""

    @property
    def tokens(self) -> int:
        return self.windows * self.seq_len

    def tensors(self) -> dict[str, Tensor]:
        ids = torch.ones(self.windows, self.seq_len, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Unsummed(GradientSums):
    """Leaves gradients where they are."""

    def _adder(self, key: tuple[str, str]) -> Callable[[Tensor], None]:
        return lambda stack: None


class ImaginedModel:
    """A model without content (see ``imagined``) on which steps of the commands are run.

    Args:
        config: The model's config; it is changed when experts are cut.
        dtype: Of the weights, as they are loaded.
        keep: Experts that each layer keeps; default is all.
        gathered: Type that moe_fsdp gathers decoder layers in; default is that of the weights.
        quantize: How moe_fsdp packs experts; default is not at all.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        keep: Mapping[str, Sequence[int]] | None = None,
        gathered: torch.dtype | None = None,
        quantize: Quantisation | None = None,
    ) -> None:
        with imagined() as self._mode:
            self.network = new_model(config, dtype)
            if keep is not None:
                keep_experts(self.network, keep)
            self.moe_layers = find_moe_layers(self.network)
            if quantize is not None:
                self._pack(quantize)
            self.weights = weights_of(self.network)
            """As they are stored."""
            for weight in self.weights:
                parameter = self.network.get_parameter(weight.name)
                if gathered is not None and weight.layer is not None and weight.split:
                    parameter.data = parameter.data.to(gathered if parameter.is_floating_point() else parameter.dtype)
        self._stored = {weight.name: weight for weight in self.weights}
        self._computed = {name: parameter.dtype for name, parameter in self.network.named_parameters()}

    def _pack(self, kind: Quantisation) -> None:
        """Put packed bytes in place of the experts' stacks, as ``quantise_experts`` does."""
        for layer in self.moe_layers:
            unpack: dict[str, Callable[[], Tensor]] = {}
            for name, stack in stacked_parameters(layer.experts).items():
                packed = torch.empty(stack.shape[0], 1, int(stack[0].numel() * PACKED_BYTES[kind]), dtype=torch.uint8)
                setattr(layer.experts, name, nn.Parameter(packed, requires_grad=False))
                unpack[name] = partial(torch.empty, stack.shape, dtype=stack.dtype)
            vars(layer.experts)[UNPACK] = unpack
        self.network.set_experts_implementation(IMPLEMENTATION)

    @property
    def width(self) -> int:
        """H."""
        embedding = self.network.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.embedding_dim

    def learn(self, train: Trained) -> frozenset[str]:
        """Let these weights learn, and give their names. Where not all do, ``RouterRebalance`` makes them float32."""
        chosen = {id(parameter) for parameter in trained_parameters(self.network, train)}
        learns = {name for name, parameter in self.network.named_parameters() if id(parameter) in chosen}
        wide = {name for name in learns if train != "all" and self._stored[name].dtype.itemsize < 4}
        with imagined(self._mode):
            for name, parameter in self.network.named_parameters():
                wanted = torch.float32 if name in wide else self._computed[name]
                if parameter.dtype != wanted:
                    parameter.data = parameter.data.to(wanted)
                if parameter.is_floating_point():
                    parameter.requires_grad_(name in learns)
        self.weights = [
            replace(weight, dtype=torch.float32) if name in wide else weight for name, weight in self._stored.items()
        ]
        return frozenset(learns)

    def evaluate(self, batch: Batch) -> StepBytes:
        """A batch of ``evaluate``: decoder, head, loss."""

        def step(module: MoECausalLM, backward: Backward) -> None:
            tensors = batch.tensors()
            with torch.no_grad():
                next_token_loss(module(tensors), tensors)

        return self._trace(batch, step, training=False)[0]

    def observe(self, batch: Batch) -> StepBytes:
        """A batch of ``score``, without what the statistics take."""

        def step(module: MoECausalLM, backward: Backward) -> None:
            with torch.no_grad(), expert_hooks(self.network, self.moe_layers, {}):
                module.decode(batch.tensors())

        return self._trace(batch, step, training=False)[0]

    def watch(self, batch: Batch) -> StepBytes:
        """A batch of the pass that sums input norms up for ``2:4-wanda``, without the sums.

        One expert of each layer is given all tokens, which takes most.
        """

        def see(stack: str, inputs_NI: Tensor, token_N: Tensor, count_E: Tensor) -> None:
            inputs_NI[: batch.tokens].float().square().sum(0, dtype=torch.float64)

        def step(module: MoECausalLM, backward: Backward) -> None:
            hooks = {layer.name: ExpertHooks(watch=see) for layer in self.moe_layers}
            with torch.no_grad(), expert_hooks(self.network, self.moe_layers, hooks):
                module.decode(batch.tensors())

        return self._trace(batch, step, training=False)[0]

    def input_sums(self) -> int:
        """What that pass sums up on the device."""
        with torch.device("meta"):
            sums = InputSums(self.network).sums()
        return sum(tensor.nbytes for tensor in sums.values())

    def recorded(self, batch: Batch) -> int:
        """What ``scan`` holds of a batch while it runs it again and again: hidden states, and logits of routers."""
        inputs = LayerInputs(self.network, [layer.parts.index for layer in self.moe_layers])

        def step(module: MoECausalLM, backward: Backward) -> None:
            with torch.no_grad(), inputs.recorded():
                module.decode(batch.tensors())

        self._trace(batch, step, training=False)
        return inputs.nbytes + 4 * batch.tokens * sum(layer.num_experts for layer in self.moe_layers)

    def gradients(self, batch: Batch, layers: Collection[int], whole: bool) -> StepBytes:
        """A batch of the pass that sums the gradients of these decoder layers' experts, without the sums.

        ``whole``: those of a split model, which stay until their layer is done, when they are reduced.
        """
        chosen = [layer for layer in self.moe_layers if layer.parts.index in layers]
        sums = _Unsummed(chosen) if whole else GradientSums(chosen)
        stacks = {id(stack) for layer in chosen for stack in stacked_parameters(layer.experts).values()}
        for parameter in self.network.parameters():  # now, too: a trace asks what learns before it begins
            parameter.requires_grad_(id(parameter) in stacks)

        def step(module: MoECausalLM, backward: Backward) -> None:
            tensors = batch.tensors()
            for _ in range(2):  # the second time there are sums to add to
                with sums.attached(self.network):
                    loss_B, _ = next_token_loss(module(tensors), tensors)
                    with torch.autocast("cpu", enabled=False):
                        backward(loss_B.sum())
                    torch.clear_autocast_cache()
                del loss_B  # which holds on to what checkpointing keeps

        first, second = self._trace(batch, step, training=False)
        return replace(second, entry=first.entry)

    def tune(self, batch: Batch) -> StepBytes:
        """A batch of tuning what ``learn`` said."""

        def step(module: MoECausalLM, backward: Backward) -> None:
            with self._computing(batch):
                loss = module.training_step(batch.tensors(), 0)
            backward(loss)

        return self._trace(batch, step, autocast=False)[0]

    def search(self, batch: Batch, arguments: Mapping[str, Any]) -> list[StepBytes]:
        """A batch of ``search``: the teacher's pass, where there is one, and the student's."""

        def step(module: MoECausalLM, backward: Backward) -> None:
            search = DiEPSearch(module, **{**arguments, "accumulate": 2})  # so that no update follows
            search.configure_model()
            vars(search)["manual_backward"] = backward
            search.on_fit_start()
            search.training_step(batch.tensors(), 0)

        return self._trace(batch, step)

    def weight_figures(self) -> int:
        """The most that ``score`` takes for the figures of one layer's weights."""
        most = 0
        kinds = {tuple(p.shape for p in layer.experts.parameters()): layer for layer in self.moe_layers}
        with imagined(self._mode):
            for layer in kinds.values():
                with LiveBytes([*self.network.parameters(), *self.network.buffers()]) as live:
                    weight_stats(layer, stable_ranks=False)
                most = max(most, live.peak)
        return most

    def statistics(self) -> int:
        """What ``score`` sums up on the device: of each sum there is a blank one beside it, in torchmetrics."""
        with torch.device("meta"):
            sums = Observation(self.network).sums()
        return 2 * sum(tensor.nbytes for tensor in sums.values())

    def _trace(
        self,
        batch: Batch,
        step: Callable[[MoECausalLM, Backward], None],
        training: bool = True,
        autocast: bool = True,
    ) -> list[StepBytes]:
        with imagined(self._mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a module that logs without a Trainer
            module = MoECausalLM().adopt(self.network.train(training))
            if batch.recompute:
                self.network.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.network.gradient_checkpointing_disable()

            def run(backward: Backward) -> None:
                with self._computing(batch, autocast):
                    step(module, backward)

            return trace_step(self.network, run)

    @contextmanager
    def _computing(self, batch: Batch, autocast: bool = True) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and batch.autocast is not None):
            yield
