"""Lanes that do one thing at a time, in the order it was asked for. Integer nanoseconds, no clock of its own.

An action starts when every lane that it occupies is free and everything that it waits for has ended. Actions are
issued in program order, so the total order of events is that of their start times, and by issue where those are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from simulate.timeline import Interval


class Engine:
    """Issues actions on lanes and keeps their intervals."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self._free: dict[str, int] = {}

    def issue(
        self,
        action: Literal["run", "copy", "read", "hop"],
        label: str,
        *,
        lanes: Sequence[str],
        duration_ns: int,
        after: int,
        step: int,
    ) -> int:
        """Occupy `lanes` for `duration_ns`, not before the instant `after`; return the instant it ends."""
        start = max([after, *(self._free.get(lane, 0) for lane in lanes)])
        end = start + duration_ns
        for lane in lanes:
            self._free[lane] = end
            if duration_ns:
                self.intervals.append(
                    Interval(lane=lane, start_ns=start, end_ns=end, action=action, label=label, step=step)
                )
        return end
