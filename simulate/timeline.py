"""What a simulated run did: intervals on lanes, and memory over time. Integer nanoseconds from the call's start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas

KINDS = ("weights", "kv_cache", "activations", "slots", "workspace", "context")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One action on one lane.

    lane: "cuda:0 compute", "cpu→cuda:0 copy", "disk→cpu read", "cpu compute".
    step: 0 is the prefill, n the n-th decode step.
    """

    lane: str
    start_ns: int
    end_ns: int
    action: Literal["run", "launch", "copy", "read", "hop"]
    label: str
    step: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """Bytes of one device, by kind of memory, from `time_ns` until the device's next sample."""

    time_ns: int
    device: str
    weights: int
    kv_cache: int
    activations: int
    slots: int
    workspace: int
    context: int

    @property
    def total_bytes(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.slots + self.workspace + self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneUse:
    """Of the prefill's time and of the decode steps', the part in which a lane is busy."""

    lane: str
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A simulated call.

    intervals, memory: of the steps that were kept one by one, ordered by start; `simulated_steps` says which.
    step_ns: the duration of every step, those in between included (by linear interpolation).
    kept_ns: (start, end) of the stretches that were kept, where they are not just those of `simulated_steps`.
    """

    intervals: tuple[Interval, ...]
    memory: tuple[MemorySample, ...]
    simulated_steps: tuple[int, ...]
    step_ns: tuple[int, ...]
    kept_ns: tuple[tuple[int, int], ...] = ()

    @property
    def prefill_ns(self) -> int:
        return self.step_ns[0]

    @property
    def total_ns(self) -> int:
        return sum(self.step_ns)

    @property
    def decode_ns_per_token(self) -> int:
        """Return the mean duration of a decode step, in ns; 0 where there is none."""
        decode = self.step_ns[1:]
        return sum(decode) // len(decode) if decode else 0

    def lanes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(interval.lane for interval in self.intervals))

    def busy_ns(self, lane: str, step: int) -> int:
        """Return how long a lane was busy in one simulated step, in ns."""
        return sum(i.duration_ns for i in self.intervals if i.lane == lane and i.step == step)

    def step_starts(self) -> tuple[int, ...]:
        """Return when every step begins, and last when the call ends, in ns from its start."""
        return (0, *accumulate(self.step_ns))

    def utilisation(self) -> tuple[LaneUse, ...]:
        """Return how much of the prefill and of the decode steps each lane is busy, by what was kept of them."""
        if not self.step_ns:
            return ()
        starts = self.step_starts()
        stretches = self.kept_ns or tuple((starts[step], starts[step + 1]) for step in self.simulated_steps)
        phases = [
            [(max(start, low), min(end, high)) for start, end in stretches if max(start, low) < min(end, high)]
            for low, high in ((0, starts[1]), (starts[1], starts[-1]))
        ]
        by_lane: dict[str, list[Interval]] = {}
        for interval in self.intervals:
            by_lane.setdefault(interval.lane, []).append(interval)
        return tuple(
            LaneUse(lane=lane, prefill=_share(intervals, phases[0]), decode=_share(intervals, phases[1]))
            for lane, intervals in by_lane.items()
        )

    def bottleneck(self, *, prefill: bool = False) -> str | None:
        """Return the lane that is busy most of the decode steps, or of the prefill; None where nothing ever is."""
        uses = {use.lane: use.prefill if prefill else use.decode for use in self.utilisation()}
        return max(sorted(uses), key=uses.__getitem__) if any(uses.values()) else None

    def peak_bytes(self, device: str) -> int:
        """Return the most bytes that `device` held at any instant: every kind of memory, context included.

        Raises:
            KeyError: `device` is not in the timeline.
        """
        totals = [sample.total_bytes for sample in self.memory if sample.device == device]
        if not totals:
            raise KeyError(f"{device} is not in the timeline")
        return max(totals)

    def frame(self) -> pandas.DataFrame:
        """Return the intervals as a table: lane, start_ns, end_ns, action, label, step."""
        import pandas

        columns = ("lane", "start_ns", "end_ns", "action", "label", "step")
        return pandas.DataFrame({name: [getattr(i, name) for i in self.intervals] for name in columns})

    def memory_frame(self) -> pandas.DataFrame:
        """Return what devices hold over time as a table: time_ns, device, bytes of every kind of memory, and total."""
        import pandas

        columns = ("time_ns", "device", *KINDS)
        table = pandas.DataFrame({name: [getattr(sample, name) for sample in self.memory] for name in columns})
        return table.assign(total=table[list(KINDS)].sum(axis=1))

    def to_chrome_trace(self) -> str:
        """Return intervals, and memory by kind, as JSON in the Trace Event Format, which Perfetto and chrome://tracing
        open.
        """
        numbers = {lane: number for number, lane in enumerate(self.lanes())}
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": lane}}
            for lane, number in numbers.items()
        ]
        events += [
            {"ph": "X", "pid": 0, "tid": numbers[i.lane], "name": i.label, "cat": i.action, "ts": i.start_ns / 1e3,
             "dur": i.duration_ns / 1e3, "args": {"step": i.step}}
            for i in self.intervals
        ]  # fmt: skip
        events += [
            {"ph": "C", "pid": 0, "name": f"{sample.device} bytes", "ts": sample.time_ns / 1e3,
             "args": {kind: getattr(sample, kind) for kind in KINDS}}
            for sample in self.memory
        ]  # fmt: skip
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _share(intervals: list[Interval], stretches: list[tuple[int, int]]) -> float:
    """Return the part of the stretches that the intervals of one lane cover."""
    whole = sum(end - start for start, end in stretches)
    busy = sum(
        max(0, min(interval.end_ns, end) - max(interval.start_ns, start))
        for start, end in stretches
        for interval in intervals
    )
    return busy / whole if whole else 0.0
