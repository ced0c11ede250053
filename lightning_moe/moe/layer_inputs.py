"""LayerInputs: what decoder layers were given in one forward, so that further ones can begin at any of them."""

# B sequences, S positions, H model width

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_moe.moe.decoder_layers import decoder_layers
from lightning_moe.moe.hidden_states import as_given, given_back, taken, tuple_size
from lightning_moe.moe.stand_ins import StandIn, standing_in


class LayerInputs:
    """The inputs of some decoder layers of a model, and forwards of it that begin there.

    Run the model inside ``recorded``; then run it inside ``begun_at``, where the layers before are passed over. All
    that is not a decoder layer is made by the model's own code each time: masks, positions, the last norm, the head.
    It holds ``(B, S, H)`` in the type of the hidden states for each of these layers, and the output of the last one,
    where the model computes.

    Args:
        model: The model.
        numbers: The decoder layers to begin at.
    """

    def __init__(self, model: nn.Module, numbers: Iterable[int]) -> None:
        self.layers = decoder_layers(model)
        self.numbers = sorted({*numbers})
        self._inputs: dict[int, Tensor] = {}
        self._sizes: list[int | None] = [None] * len(self.layers)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the layers are given by the forward inside the context, in place of what was kept before."""
        self._inputs = {}
        with ExitStack() as handles:
            for number in self.numbers:
                hook = self._keeper(number)
                handles.callback(self.layers[number].register_forward_pre_hook(hook, with_kwargs=True).remove)
            for number, layer in enumerate(self.layers):
                handles.callback(layer.register_forward_hook(self._reader(number)).remove)
            yield

    def _keeper(self, number: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[number] = taken(args, kwargs)

        return before

    def _reader(self, number: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._sizes[number] = tuple_size(output)
            if number == len(self.layers) - 1:
                self._inputs[len(self.layers)] = given_back(output)

        return after

    @contextmanager
    def begun_at(self, number: int, rows_B: Tensor | None = None) -> Iterator[None]:
        """Run only the layers from this one on, on the recorded hidden states; from ``len(layers)`` on, only the head.

        The model must be given the ids and mask of the same batch, or of those of its sequences that ``rows_B`` names.
        """
        hidden = self._inputs[number]
        hidden = hidden if rows_B is None else hidden[rows_B]
        passed = {
            before: _PassedOver(self.layers[before], as_given(hidden, self._sizes[before])) for before in range(number)
        }
        with standing_in(self.layers, passed):
            yield

    @property
    def nbytes(self) -> int:
        """That it holds."""
        return sum(hidden.nbytes for hidden in self._inputs.values())

    def forget(self) -> None:
        """Let go of the memory."""
        self._inputs = {}


class _PassedOver(StandIn):
    """Gives what it was told, whatever it is given."""

    def __init__(self, layer: nn.Module, result: Any) -> None:
        super().__init__(layer)
        vars(self)["result"] = result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result
