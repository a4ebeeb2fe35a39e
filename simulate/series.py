"""How long each of many steps takes, of which only some are simulated.

Those at either end are, as they come. Between them a step is repeated until it takes as long as the time before: then
copies that run ahead have settled. What lies between two of these is on their line where the one in the middle is, and
is looked at more closely where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

# Steps kept at either end; of at most twice as many, each is simulated.
STEPS_AT_EACH_END = 4
# A step is settled when it takes as long as the time before, or after so many times.
_REPEATS = 6
# Of steps of which no two are alike so many, evenly spread, are simulated.
STEPS_DRAWN = 256
# How far from its neighbours' line a step may lie before those between are looked at, as a fraction.
_LINE = 1e-4


class Simulate(Protocol):
    """Simulates one step, after whatever was simulated before it."""

    def __call__(self, number: int, *, keep: bool) -> int:
        """Return how long it takes, in ns. keep: it is one of those at either end."""


def durations(first: int, last: int, simulate: Simulate, *, drawn: bool, rounding_ns: int) -> list[int]:
    """Return how long every step from `first` to `last` takes, in ns.

    drawn: no two steps are alike, as where experts are drawn. rounding_ns: what two equal steps may differ by.
    """
    if last < first:
        return []
    near = set(at_both_ends(first, last))
    known: dict[int, int] = {}
    for number in sorted(near | set(_spread(first, last, STEPS_DRAWN))) if drawn else sorted(near):
        if known and number - 1 not in known and not drawn:
            known |= _Gap(simulate, rounding_ns).known(max(known), number - 1, known[max(known)])
        known[number] = simulate(number, keep=number in near)
    return _interpolated(known)


class _Gap:
    """Steps that are not kept."""

    def __init__(self, simulate: Simulate, rounding_ns: int):
        self._simulate, self._rounding_ns = simulate, rounding_ns

    def known(self, before: int, last: int, before_ns: int) -> dict[int, int]:
        """Return the durations of as many steps after `before`, which took `before_ns`, to `last` as lines need."""
        known = {last: self._settled(last)}
        open_ends = [(before, before_ns, last, known[last])]
        while open_ends:
            low, low_ns, high, high_ns = open_ends.pop()
            if high - low < 2:
                continue
            middle = (low + high) // 2
            found = known[middle] = self._settled(middle)
            straight = between(low_ns, high_ns, (middle - low) / (high - low))
            if abs(found - straight) > max(2 * self._rounding_ns, _LINE * found):
                open_ends += [(low, low_ns, middle, found), (middle, found, high, high_ns)]
        self._settled(last)
        return known

    def _settled(self, number: int) -> int:
        taken = self._simulate(number, keep=False)
        for _ in range(_REPEATS):
            before, taken = taken, self._simulate(number, keep=False)
            if abs(taken - before) <= self._rounding_ns:
                break
        return taken


def between(first: int, last: int, weight: float) -> int:
    """Return what is `weight` of the way from one whole number to another."""
    return first + round((last - first) * weight)


def at_both_ends(first: int, last: int) -> list[int]:
    """Return the numbers from `first` to `last`, of many only those at either end."""
    if last - first < 2 * STEPS_AT_EACH_END:
        return list(range(first, last + 1))
    return [*range(first, first + STEPS_AT_EACH_END), *range(last - STEPS_AT_EACH_END + 1, last + 1)]


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return at most `count` numbers from `first` to `last`, evenly spread."""
    numbers = last - first + 1
    return list(range(first, last + 1)) if numbers <= count else [first + i * numbers // count for i in range(count)]


def _interpolated(known: Mapping[int, int]) -> list[int]:
    """Return all durations from the first number to the last; those not known lie on the line of their neighbours."""
    result: list[int] = []
    numbers = sorted(known)
    for low, high in pairwise(numbers):
        result += [between(known[low], known[high], (n - low) / (high - low)) for n in range(low, high)]
    return [*result, known[numbers[-1]]]
