"""A plan's predictions beside what was measured: which is off, by how much, and what to try."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.measurement import Measurement, PhaseTimes
from planner.plan import Plan, Prediction
from planner.units import format_bytes, format_ns

_WIDTH = 80
# The ids and the mask of a call, each of 64-bit integers: the caller's own, and in no prediction.
_INPUT_BYTES = 2 * 8
# Predictions that are greatest over all that may happen, so that less is as expected: they count with whole
# allocations, the worst routing, or what other devices hold.
_BOUNDS = ("reserved", "device_used")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One prediction beside what was measured, in bytes or ns.

    what: such as "cuda:0 reserved", or "decode step". low, high: from what to what is as expected; None: not known,
    so that nothing is judged.
    """

    what: str
    unit: Literal["bytes", "ns"]
    predicted: int
    measured: int
    low: int | None
    high: int | None
    advice: str = ""

    @property
    def error(self) -> float:
        """Return how far what was measured is above what was predicted, as a fraction of that."""
        return (self.measured - self.predicted) / self.predicted if self.predicted else float(self.measured > 0)

    @property
    def as_expected(self) -> bool | None:
        """Whether it lies where it is expected; None where that is not known."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Every prediction that was measured. notes: what else was other than planned, and what was not measured."""

    model: str
    deviations: tuple[Deviation, ...]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is known to be off."""
        return all(entry.as_expected is not False for entry in self.deviations)

    def __str__(self) -> str:
        """Return a table of at most 80 columns, and what to try."""
        head = ("", "predicted", "measured", "off by", "")
        rows = [head, *(_row(entry) for entry in self.deviations)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [_fitting(self.model)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
            lines.append(_fitting("  ".join(cells)))
        for text in (*self.notes, *dict.fromkeys(e.advice for e in self.deviations if e.advice)):
            lines += textwrap.wrap(text, _WIDTH, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)


def compare(plan: Plan, measurement: Measurement) -> Check:
    """Return every prediction of the plan beside its measurement.

    Bytes of tensors are expected exactly, but for the caller's own ids and mask, where the plan runs on one device, all
    experts are computed at once, and the work was the planned one; else, and where an allocator or a driver counts, no
    more than was predicted. Times are expected within the plan's range, where rates were measured with a spread.
    """
    prediction = plan.prediction
    if prediction is None:
        note = "the plan predicts nothing: it was made from a device map, or by hand"
        return Check(model=plan.model.id, deviations=(), notes=(note,))
    more, less = _work(plan, measurement)
    deviations = [*_bytes(plan, prediction, measurement, more=bool(more), less=bool(less))]
    deviations += _times(plan, prediction, measurement, other=bool(more or less))
    seen = {entry.what for entry in deviations}
    notes = [*more, *less]
    unseen = [name for name in prediction.counters if not any(what.startswith(f"{name} ") for what in seen)]
    if unseen:
        notes.append(f"nothing was measured of {', '.join(unseen)}")
    if measurement.metered:
        notes.append("times were slowed by following each operator: measure them with memory=False")
    return Check(model=plan.model.id, deviations=tuple(deviations), notes=tuple(notes))


def _work(plan: Plan, measured: Measurement) -> tuple[list[str], list[str]]:
    """Return in words what was called for more than planned, and what for less."""
    work = plan.workload
    prompt = work.prompt_tokens
    pairs = [
        ("rows", measured.rows, work.rows),
        ("tokens of a prompt", measured.prompt_tokens, prompt),
        ("tokens of context", measured.context_tokens, prompt + work.decode_steps),
    ]
    if not measured.rows:
        return [], []
    more = [f"MORE THAN PLANNED: {found:,} {what}; the plan is for {wanted:,}" for what, found, wanted in pairs
            if found > wanted]  # fmt: skip
    less = [f"less than planned: {found:,} {what}; the plan is for {wanted:,}" for what, found, wanted in pairs
            if found < wanted]  # fmt: skip
    return more, less


def _bytes(plan: Plan, prediction: Prediction, measured: Measurement, *, more: bool, less: bool) -> Iterator[Deviation]:
    work, first = plan.workload, plan.run_on()[0]
    inputs = _INPUT_BYTES * work.rows * work.prompt_tokens
    one_device = len(set(plan.run_on())) == 1
    routed = plan.execution.experts is not None
    for name, counters in sorted(prediction.counters.items()):
        for counter, predicted in counters.items():
            found = measured.counters.get(name, {}).get(counter)
            if found is None:
                continue
            high = predicted + (inputs if name == first else 0)
            exact = counter not in _BOUNDS and one_device and not routed and not less
            low = predicted if exact else 0
            over, under = found > high, found < low
            advice = ""
            if over and more:
                advice = f"{name}: more was asked for than planned; plan with the batch and context that are called"
            elif over:
                advice = (
                    f"{name}: {format_bytes(found - high)} more in {counter} than predicted; plan with "
                    f"max_memory={{{name!r}: ...}} less by that, and report it: what is not modelled is listed in the "
                    "plan's execution"
                )
            elif under:
                advice = f"{name}: less in {counter} than predicted; was the work the planned one, to its end?"
            yield Deviation(
                what=f"{name} {counter.replace('_', ' ')}", unit="bytes", predicted=predicted, measured=found,
                low=low, high=high, advice=advice,
            )  # fmt: skip


def _times(plan: Plan, prediction: Prediction, measured: Measurement, *, other: bool) -> Iterator[Deviation]:
    phases: tuple[tuple[str, int, tuple[int, ...], PhaseTimes | None], ...] = (
        ("prefill", prediction.prefill_ns, prediction.prefill_ns_range, measured.prefill),
        ("decode step", prediction.decode_ns_per_token, prediction.decode_ns_range, measured.decode),
    )
    for what, predicted, between, times in phases:
        if times is None or not predicted:
            continue
        found = times.median_ns
        judged = bool(between) and not other and not measured.metered
        low, high = (min(between), max(between)) if judged else (None, None)
        advice = ""
        if low is not None and high is not None and not low <= found <= high:
            advice = (
                f"{what}: measure the machine again (plan calibrate), or correct what bounds it "
                "(planner.corrected_hardware)"
            )
        elif not between:
            advice = (
                "times are predicted from rates that were assumed, and nothing is expected of them: measure the "
                "machine (plan calibrate), or correct what bounds them (planner.corrected_hardware)"
            )
        yield Deviation(what=what, unit="ns", predicted=predicted, measured=found, low=low, high=high, advice=advice)


def _row(entry: Deviation) -> tuple[str, str, str, str, str]:
    said = format_bytes if entry.unit == "bytes" else format_ns
    verdict = {None: "not judged", True: "as expected", False: "OFF"}[entry.as_expected]
    off = "exact" if entry.measured == entry.predicted else f"{entry.error:+.1%}"
    if off in ("+0.0%", "-0.0%"):
        off = f"{entry.measured - entry.predicted:+,} {'B' if entry.unit == 'bytes' else 'ns'}"
    return entry.what, said(entry.predicted), said(entry.measured), off, verdict


def _fitting(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text).rstrip()
    return plain if len(plain) <= _WIDTH else f"{plain[: _WIDTH - 1]}…"
