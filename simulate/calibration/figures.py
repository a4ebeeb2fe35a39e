"""How a rate is measured: repeated samples, each long enough for the clock; the mean of their times, and their spread.

A call is a sum of many such times, so what it takes on a machine that is disturbed now and then (by other processes, or
other guests of a virtual machine) is told by their mean, and neither by the quickest nor by the one in the middle.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["FLOP/s", "B/s", "ns"]
# One sample takes at least this, so that neither the clock nor one turn of the scheduler is much of it.
LEAST_SAMPLE_S = 0.005
LEAST_SAMPLES = 3
# Of the samples, what lies within the spread.
_COVERED = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured rate or time: that of the mean time of its samples.

    group, name: what was measured, as tables print it.
    spread: 9 of 10 samples took at most so much more or less time, as a fraction of it.
    """

    group: str
    name: str
    value: int
    unit: Unit
    spread: float
    samples: int


def time_of(group: str, name: str, times_ns: Iterable[float]) -> Figure:
    """Return the time that samples make, in ns."""
    samples = list(times_ns)
    mean = statistics.fmean(samples)
    apart = sorted(abs(sample / mean - 1) for sample in samples) if mean > 0 else [0.0]
    spread = apart[math.ceil(_COVERED * len(apart)) - 1]
    return Figure(
        group=group, name=name, value=max(1, round(mean)), unit="ns", spread=round(spread, 4), samples=len(samples)
    )


def rate_of(group: str, name: str, unit: Unit, work: float, seconds: Iterable[float]) -> Figure:
    """Return the rate at which `work` is done in the mean of `seconds`."""
    taken = time_of(group, name, (each * 1e9 for each in seconds))
    return replace(taken, value=max(1, round(work * 1e9 / taken.value)), unit=unit)


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Return what several rounds make of one figure: the mean of their times, and a spread that holds all of theirs."""
    is_time = figures[0].unit == "ns"
    times = [float(figure.value) if is_time else 1 / figure.value for figure in figures]
    mean = statistics.fmean(times)
    ends = [time * (1 + side * figure.spread) for time, figure in zip(times, figures, strict=True) for side in (-1, 1)]
    return replace(
        figures[0],
        value=max(1, round(mean if is_time else 1 / mean)),
        spread=round(max(abs(end / mean - 1) for end in ends), 4),
        samples=sum(figure.samples for figure in figures),
    )


class Meter:
    """Times calls.

    seconds: for one figure, after warming up; at least LEAST_SAMPLES samples are taken, however long they are.
    clock: the seconds that have passed; report: told what is being measured.
    """

    def __init__(
        self,
        *,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.seconds, self.clock, self.report = seconds, clock, report

    def samples(
        self,
        call: Callable[[], object],
        *,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> list[float]:
        """Return the seconds that single calls take.

        before: made ready for each call, untimed; each sample is then one call. after: ends a sample, timed with it.
        """

        def timed(count: int) -> float:
            if before is not None:
                before()
            started = self.clock()
            for _ in range(count):
                call()
            if after is not None:
                after()
            return self.clock() - started

        once = timed(1)
        count = 1
        if before is None:
            once = timed(1)
            count = max(1, math.ceil(LEAST_SAMPLE_S / max(once, 1e-7)))
        found: list[float] = []
        spent = 0.0
        while len(found) < LEAST_SAMPLES or spent < self.seconds:
            taken = timed(count)
            spent += max(taken, once)
            found.append(max(taken, 1e-9) / count)
        return found

    def rate(
        self,
        group: str,
        name: str,
        unit: Unit,
        call: Callable[[], object],
        work: float,
        *,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> Figure:
        """Return how much of `work`, which one call does, is done in a second."""
        self.report(f"measuring {group}: {name}")
        return rate_of(group, name, unit, work, self.samples(call, before=before, after=after))
