"""Bytes held over time: a stream of allocations and frees, and what one operator takes beside its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["weights", "kv_cache", "activations", "scratch", "library"]


class Event(NamedTuple):
    """A block of memory is taken (`nbytes` > 0) or given back (`nbytes` < 0, minus what it took).

    block: a number of its own for every allocation, never used again.
    kind: what the block is for; "scratch" lives inside one operator, "library" is taken once by a library and kept.
    """

    block: int
    nbytes: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a kernel allocates while one operator runs, besides the tensors that it returns.

    program: steps in order. n > 0 allocates n bytes; 0 stands for the allocation of the operator's outputs; -k frees
        the k-th allocation of this program (from 1). What is not freed is freed, last first, when the operator ends.
    keeps: (name, bytes) of library workspaces that the first operator with that name takes, before its program, and
        that stay.
    """

    program: tuple[int, ...] = (0,)
    keeps: tuple[tuple[str, int], ...] = ()


OUTPUTS_ONLY = Scratch()


def peak_bytes(events: Iterable[Event]) -> int:
    """Return the most bytes held at once by a stream that starts with nothing held."""
    held = most = 0
    for event in events:
        held += event.nbytes
        most = max(most, held)
    return most
