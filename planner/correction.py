"""The machine of a plan, corrected by what a run took: the rate that bounds each phase, and no other.

Which that is, the cost model says. The whole difference between the time measured and the time predicted is put on it,
so that the plan would have been right; what else was off at the same time is then in that rate too. Measuring each
rate by itself (`plan calibrate`) is better, and this is for where that cannot be done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planner.cost import (
    Step,
    cache_ns,
    layer_ns,
    path_rate,
    roofs_ns,
    steps_of,
    waiting_copy_ns,
    waiting_cpu_ns,
    weight_dtype,
)
from planner.errors import InputError
from planner.hardware import Device, Hardware
from planner.host_cache import is_on_host
from planner.measurement import Measurement
from planner.memory import waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.steps import transfers
from planner.units import format_ns

_ROOFS: tuple[Literal["arithmetic", "memory", "operators"], ...] = ("arithmetic", "memory", "operators")


@dataclass(frozen=True, slots=True)
class Lane:
    """A rate that a phase's time goes by: of a device's arithmetic, memory, operators or of all it does, or of a link
    (`source` to `name`).
    """

    kind: Literal["arithmetic", "memory", "operators", "all rates", "link", "given"]
    name: str
    source: str = ""

    def __str__(self) -> str:
        if self.kind == "link":
            return f"the link from {self.source} to {self.name}"
        return f"{self.kind} of {self.name}"


@dataclass(frozen=True, slots=True)
class _Phase:
    """A phase's time, predicted and measured, in ns; how often it is in the call; and what its lanes take of it."""

    name: str
    predicted_ns: int
    measured_ns: int
    times: int
    lanes: dict[Lane, int]

    @property
    def bound(self) -> Lane:
        return max(sorted(self.lanes, key=str), key=self.lanes.__getitem__)


def corrected_hardware(plan: Plan, measurement: Measurement) -> Hardware:
    """Return the plan's machine with the rate that bounds each measured phase scaled, so that it takes what it took.

    Where both phases go by one rate, the phase that is longer in the whole call decides. What was done is said in
    `assumptions`; `save` writes the machine, and `--hardware FILE` plans with it.

    Raises:
        InputError: the plan predicts no times, the measurement has none that can be compared with them, or the
            difference is more than the rate that bounds can account for.
    """
    phases = sorted(_phases(plan, measurement), key=lambda phase: -phase.predicted_ns * phase.times)
    hardware, done = plan.hardware, set[Lane]()
    for phase in phases:
        lane = phase.bound
        if lane in done:
            continue
        done.add(lane)
        taken = phase.lanes[lane]
        wanted = taken + phase.measured_ns - phase.predicted_ns
        if wanted <= 0 or lane.kind == "given":
            raise InputError(
                f"a {phase.name} took {format_ns(phase.measured_ns)} and not {format_ns(phase.predicted_ns)}; "
                f"{lane}, which bounds it, takes {format_ns(taken)} of that: no rate accounts for the "
                "difference; measure the machine with plan calibrate"
            )
        factor = taken / wanted
        hardware = _scaled(hardware, lane, factor, weight_dtype(plan.graph))
        note = (
            f"{lane}: times {factor:.3g}, as a {phase.name} of {plan.model.id} took {format_ns(phase.measured_ns)} "
            f"and not {format_ns(phase.predicted_ns)}"
        )
        hardware = replace(hardware, assumptions=(*hardware.assumptions, note))
    return hardware


def _phases(plan: Plan, measured: Measurement) -> list[_Phase]:
    prediction, work = plan.prediction, plan.workload
    if prediction is None:
        raise InputError("the plan predicts no times: it was made from a device map, or by hand; plan again")
    if measured.metered:
        raise InputError(
            "the times of this measurement were slowed by following each operator: measure with memory=False"
        )
    planned = (work.rows, work.prompt_tokens, work.prompt_tokens + work.decode_steps)
    found = (measured.rows, measured.prompt_tokens, measured.context_tokens)
    if measured.rows and found != planned:
        raise InputError(
            f"measured were {found[0]} rows, prompts of {found[1]} and {found[2]} tokens of context, and the plan is "
            f"for {planned[0]}, {planned[1]} and {planned[2]}: measure the planned work, or plan the measured one"
        )
    steps = steps_of(plan.graph, replace(work, objective="latency"))
    phases = []
    if measured.prefill is not None:
        lanes: dict[Lane, int] = {}
        for step in steps:
            for lane, taken in _lanes(plan, step).items() if step.is_prefill else ():
                lanes[lane] = lanes.get(lane, 0) + taken * step.times
        phases.append(_Phase("prefill", prediction.prefill_ns, measured.prefill.median_ns, 1, lanes))
    if measured.decode is not None and prediction.decode_ns_per_token:
        step = next(step for step in steps if not step.is_prefill)
        took = measured.decode.median_ns
        phases.append(_Phase("decode step", prediction.decode_ns_per_token, took, step.times, _lanes(plan, step)))
    if not phases:
        raise InputError("no pass of the model was measured, so that there is nothing to correct by")
    return phases


def _lanes(plan: Plan, step: Step) -> dict[Lane, int]:
    """Return what every rate takes of one pass, in ns, each by itself."""
    graph, hardware = plan.graph, plan.hardware
    dtype, devices, found = weight_dtype(graph), plan.run_on(), dict[Lane, int]()

    def add(lane: Lane, taken: int) -> None:
        found[lane] = found.get(lane, 0) + taken

    for index, name in enumerate(devices):
        for lane, taken in _computing(plan, step, index, hardware.device(name), dtype):
            add(lane, taken // len(step.passes))
        if is_on_host(graph):
            add(Lane("link", name, hardware.host(name)), cache_ns(hardware, step, index, name)[1])
    tokens = step.tokens * graph.batch_size
    for placement, group in with_groups(graph, plan.placements):
        waiting = waiting_slices(placement, group)
        if not waiting:
            continue
        home, device = placement.home, placement.run_on
        if placement.memory != "disk" and tokens <= placement.cpu_up_to_tokens:
            taken = waiting_cpu_ns(hardware, group, home, device, waiting=waiting, tokens=tokens, dtype=dtype)
            add(Lane("all rates", home), taken)
        else:
            taken = waiting_copy_ns(hardware, group, home, device, placement.memory, waiting=waiting, tokens=tokens)
            add(_way(hardware, placement), taken)
    for move in transfers(graph, list(devices)):
        add(Lane("link", move.device, move.origin), move.ns(hardware, prefill=step.is_prefill))
    return found


def _computing(plan: Plan, step: Step, index: int, device: Device, dtype: str) -> list[tuple[Lane, int]]:
    """Return what bounds a layer in each of a step's passes, and its time there, in ns."""
    graph, tokens, found = plan.graph, step.tokens * plan.graph.batch_size, []
    given = graph.measured_ns(index, device.name, prefill=step.is_prefill) is not None
    for entry in step.passes:
        span, kind = entry.per_layer()[index], graph.kind_of(index)
        taken = layer_ns(graph, index, span, device, tokens=tokens, dtype=dtype, prefill=step.is_prefill)
        if given or device.matmuls:
            found.append((Lane("given" if given else "all rates", device.name), taken))
            continue
        roofs = roofs_ns(kind, span, device, tokens=tokens, dtype=dtype)
        found.append((Lane(_ROOFS[roofs.index(max(roofs))], device.name), taken))
    return found


def _way(hardware: Hardware, placement: Placement) -> Lane:
    """Return the link that bounds the way of a placement's weights: the slower of the disk's and the device's."""
    home, device, host = placement.home, placement.run_on, hardware.host(placement.run_on)
    if placement.memory == "disk" and device != host:
        through = hardware.link(host, device).bytes_per_s
        if path_rate(hardware, home, device, "disk")[0] == through:
            return Lane("link", device, host)
        return Lane("link", host, home)
    return Lane("link", device, home)


def _scaled(hardware: Hardware, lane: Lane, factor: float, dtype: str) -> Hardware:
    if lane.kind == "link":
        links = tuple(
            link.times(factor) if (link.source, link.target) == (lane.source, lane.name) else link
            for link in hardware.links
        )
        return replace(hardware, links=links)

    def changed(device: Device) -> Device:
        if lane.kind == "arithmetic":
            key = dtype if dtype in device.flops_per_s else "default"
            return replace(
                device, flops_per_s={**device.flops_per_s, key: max(1, int(device.flops_for(dtype) * factor))}
            )
        if lane.kind == "memory":
            return replace(device, bytes_per_s=max(1, int(device.bytes_per_s * factor)))
        if lane.kind == "operators":
            return replace(device, operator_ns=int(device.operator_ns / factor))
        return device.times(factor)

    devices = tuple(changed(device) if device.name == lane.name else device for device in hardware.devices)
    return replace(hardware, devices=devices)
