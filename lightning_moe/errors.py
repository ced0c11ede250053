"""The one exception that means: the caller's input is wrong, and this line says how to mend it."""

from __future__ import annotations

import difflib
import pickle
import struct
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, the numbers, the remedy.

    The commands print it on stderr and leave with exit code 2; anything else is a defect and keeps its traceback.
    """


UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
    struct.error,
)
"""What torch and Lightning raise at a file of tensors that is cut off, or of something else."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence, after a space, with the known name nearest to a misspelt one; empty when none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe(error: BaseException) -> str:
    """One line for a record: bad input speaks for itself, anything else is named by its type."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
