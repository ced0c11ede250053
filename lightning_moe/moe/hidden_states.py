"""Hidden states in the calls of a decoder layer or a part of one: what it is given, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def taken(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module is given: its first argument, or that of the usual name, or the first by whatever name."""
    given: Tensor = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return given


def given_back(result: Any) -> Tensor:
    """What a decoder layer gives: a tensor, or the first of a tuple."""
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def put_back(result: Any, hidden: Tensor) -> Any:
    """What a decoder layer gives, with other hidden states in it."""
    return (hidden, *result[1:]) if isinstance(result, tuple) else hidden


def tuple_size(result: Any) -> int | None:
    """Of what a decoder layer gives; None where that is a tensor."""
    return len(result) if isinstance(result, tuple) else None


def as_given(hidden: Tensor, size: int | None) -> Any:
    """What a layer would give that gives tuples of this size: hidden states and nothing beside."""
    return hidden if size is None else (hidden, *(None,) * (size - 1))
