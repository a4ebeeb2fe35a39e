"""What a simulated run did: intervals on lanes, and memory over time. Integer nanoseconds from the call's start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas


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
class Timeline:
    """A simulated call.

    intervals, memory: of the steps that were simulated one by one, ordered by start; `simulated_steps` says which.
    step_ns: the duration of every step, those in between included (by linear interpolation).
    """

    intervals: tuple[Interval, ...]
    memory: tuple[MemorySample, ...]
    simulated_steps: tuple[int, ...]
    step_ns: tuple[int, ...]

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

    def to_chrome_trace(self) -> str:
        """Return the intervals as JSON in the Trace Event Format, which Perfetto and chrome://tracing open."""
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
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
