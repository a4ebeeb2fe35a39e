"""A Plan → the Timeline of one call: prefill, then decode steps with a growing cache.

The first steps and the last ones are simulated one by one; those between are interpolated, because a step's work is
affine in the context length. So are the calls of a prefill in chunks, which together are step 0. Experts are taken at
their expected number per pass, spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner import cost
from planner.chunks import chunks_of
from planner.errors import PlanFormatError
from planner.graph import Pass, Span
from planner.hardware import Hardware
from planner.host_cache import down_ns, host_layers, is_prefetched, up_ns
from planner.memory import Usage, static_usage
from planner.plan import Plan
from planner.steps import LayerRun, Part, Transfer, layer_runs, prefetch_order
from simulate.engine import Engine
from simulate.timeline import Interval, MemorySample, Timeline

# Steps simulated at either end; a call of at most twice as many is simulated whole.
STEPS_AT_EACH_END = 4


def run(plan: Plan) -> Timeline:
    """Simulate the plan's workload on its hardware, nothing else needed.

    Raises:
        PlanFormatError: the plan's graph has no pass for its workload.
    """
    return _Simulation(plan).run()


@dataclass(frozen=True, slots=True)
class _Call:
    """One forward call: `weight` of the way from one traced pass to another."""

    step: int
    first: Pass
    last: Pass
    weight: float = 0.0

    @property
    def prefill(self) -> bool:
        return self.step == 0


class _Simulation:
    def __init__(self, plan: Plan):
        if not plan.graph.passes:
            raise PlanFormatError("the plan's graph holds no pass to simulate")
        self.plan, self.graph, self.hardware = plan, plan.graph, plan.hardware
        self.dtype = cost.weight_dtype(plan.graph)
        self.runs = layer_runs(plan.graph, plan.placements)
        self.static = static_usage(plan.graph, plan.hardware, plan.placements, plan.slots)
        self.engine = Engine()
        self.leaves: dict[int, list[Transfer]] = {}
        for move in (move for run in self.runs for move in run.takes if not move.waits):
            self.leaves.setdefault(move.source, []).append(move)
        self.sent: dict[Transfer, int] = {}
        # Layers with a cache in host memory; when the last of them began; when the next one's is there.
        self.on_host = sorted(host_layers(plan.graph))
        self.cached_ns = 0
        self.ups: dict[int, int] = {}
        self.samples: list[MemorySample] = []
        self.copied: dict[str, list[int]] = {}
        self.queue: dict[str, list[Part]] = {}
        self.spans = {entry.name: entry.per_layer() for entry in plan.graph.passes}
        self.passes = {entry.name: entry for entry in plan.graph.passes}

    def run(self) -> Timeline:
        steps = self.plan.workload.decode_steps
        for usage_device, usage in self.static.items():
            self._sample(0, usage_device, usage)
        self._begin_prefetch()
        now, prefill_ns = self._prefill()
        ends = {0: prefill_ns}
        for step in _at_both_ends(1, steps):
            started = now
            now = self._call(self._decode(step), now)
            ends[step] = now - started
        simulated, durations = sorted(ends), _interpolate(ends, steps)
        intervals = sorted(self.engine.intervals, key=_order)
        memory = sorted(self.samples, key=lambda sample: sample.time_ns)
        return Timeline(
            intervals=tuple(intervals),
            memory=tuple(memory),
            simulated_steps=tuple(simulated),
            step_ns=tuple(durations),
        )

    def _prefill(self) -> tuple[int, int]:
        """Return when the prefill ends as simulated, and how long it takes with the chunks that were not."""
        chunks = chunks_of(self.graph, self.plan.workload)
        whole = chunks.whole - 1
        now, ends = 0, {}
        for number in (0, *_at_both_ends(1, whole)):
            started = now
            now = self._call(self._chunk(number, whole), now)
            ends[number] = now - started
        prefill_ns = sum(_interpolate(ends, whole))
        if chunks.rest:
            started = now
            now = self._call(_Call(0, self.passes["prefill_rest"], self.passes["prefill_rest"]), now)
            prefill_ns += now - started
        return now, prefill_ns

    def _chunk(self, number: int, whole: int) -> _Call:
        """Return a whole chunk of the prompt; `whole` is the number of the last."""
        if number == 0:
            return _Call(0, self.passes["prefill"], self.passes["prefill"])
        first = self.passes["prefill_next"]
        last = self.passes.get("prefill_last", first)
        return _Call(0, first, last, (number - 1) / (whole - 1) if whole > 1 else 0.0)

    def _decode(self, step: int) -> _Call:
        first = self.passes["decode_first"]
        last = self.passes.get("decode_last", first)
        steps = self.plan.workload.decode_steps
        return _Call(step, first, last, (step - 1) / (steps - 1) if steps > 1 else 0.0)

    def _call(self, call: _Call, now: int) -> int:
        first, last, weight = self.spans[call.first.name], self.spans[call.last.name], call.weight
        cached: dict[str, int] = dict.fromkeys(self.static, 0)
        for run in self.runs:
            cached[run.device] += _between(first[run.index].kv_before_bytes, last[run.index].kv_before_bytes, weight)
            if last[run.index].kv_host_bytes:
                cached[self.hardware.host(run.device)] += _between(
                    first[run.index].kv_host_bytes, last[run.index].kv_host_bytes, weight
                )
        for host in sorted({self.hardware.host(run.device) for run in self.runs if last[run.index].kv_host_bytes}):
            self._sample(now, host, self.static[host], cached[host])
        for run in self.runs:
            span, other = first[run.index], last[run.index]
            now = self._take(run, now, call.step)
            held = _between(span.requested_bytes, other.requested_bytes, weight)
            self._sample(now, run.device, self.static[run.device], cached[run.device], held)
            now = self._layer(run, call, now)
            cached[run.device] += _between(
                span.kv_after_bytes - span.kv_before_bytes, other.kv_after_bytes - other.kv_before_bytes, weight
            )
            self._sample(now, run.device, self.static[run.device], cached[run.device], 0)
            self._send(run, now, call.step)
        return now

    def _layer(self, run: LayerRun, call: _Call, now: int) -> int:
        device, step = self.hardware.device(run.device), call.step
        tokens = call.first.tokens * self.graph.batch_size
        begun, ended = (
            cost.layer_ns(
                self.graph, run.index, self.spans[entry.name][run.index], device, tokens=tokens, dtype=self.dtype,
                prefill=call.prefill,
            )
            for entry in (call.first, call.last)
        )  # fmt: skip
        now = self._bring_cache(run, call, now)
        whole = _between(begun, ended, call.weight)
        pending = 0
        for part in run.parts:
            own = round(whole * part.share)
            if part.waiting and not part.prefetched:
                now = self._run(run, "", pending, now, step)
                now = self._fetch(run, part, tokens, now, step)
                now = self._run(run, part.group.name, own, now, step)
                pending = 0
            elif part.prefetched:
                ready = self.copied[run.device].pop(0)
                now = self._run(run, part.group.name, pending + own, max(now, ready), step)
                self._prefetch(run.device, now, step)
                pending = 0
            else:
                pending += own
        return self._run(run, "", pending, now, step)

    def _bring_cache(self, run: LayerRun, call: _Call, now: int) -> int:
        """Copy a layer's cache to host memory, and begin to bring the next one's; return when computing goes on.

        Where the next one's device is not one that it is prefetched to, it is brought up when its layer begins.
        """
        if run.index not in self.on_host:
            return now
        if run.index in self.ups:
            now = max(now, self.ups.pop(run.index))
        else:
            # The first layer's is begun while the last one of the call before runs.
            begun = self.cached_ns if is_prefetched(self.hardware, run.device) else now
            now = max(now, self._up(run, call, begun))
        self.cached_ns = now
        later = self.on_host[self.on_host.index(run.index) + 1 :]
        if later and is_prefetched(self.hardware, self.runs[later[0]].device):
            self.ups[later[0]] = self._up(self.runs[later[0]], call, now)
        return self._cache_copy(run, call, down_ns, now, up=False)

    def _up(self, run: LayerRun, call: _Call, after: int) -> int:
        return self._cache_copy(run, call, up_ns, after, up=True)

    def _cache_copy(
        self, run: LayerRun, call: _Call, priced: Callable[[Hardware, Span, str], int], after: int, *, up: bool
    ) -> int:
        first, last = (self.spans[entry.name][run.index] for entry in (call.first, call.last))
        host, device = self.hardware.host(run.device), run.device
        duration = _between(priced(self.hardware, first, device), priced(self.hardware, last, device), call.weight)
        if duration == 0:
            return after
        lane = self._lane(host, device) if up else self._lane(device, host)
        waits = not (up and is_prefetched(self.hardware, device))
        lanes = (lane, f"{device} compute") if waits else (lane,)
        return self.engine.issue(
            "copy", f"{run.name} cache", lanes=lanes, duration_ns=duration, after=after, step=call.step
        )

    def _run(self, run: LayerRun, part: str, duration: int, after: int, step: int) -> int:
        label = f"{run.name} {part}".strip()
        lanes = (f"{run.device} compute",)
        return self.engine.issue("run", label, lanes=lanes, duration_ns=duration, after=after, step=step)

    def _take(self, run: LayerRun, now: int, step: int) -> int:
        """Bring what other devices made and this layer is the first here to take; return when it is there."""
        ready = max([now, *(self.sent.pop(move, now) for move in run.takes)])
        for move in run.takes:
            if move.waits:
                now = self._move(move, now, step)
        return max(now, ready)

    def _send(self, run: LayerRun, now: int, step: int) -> None:
        """Send what a layer made and nothing waits for: it is under way before it is taken."""
        for move in self.leaves.get(run.index, ()):
            self.sent[move] = self._move(move, now, step)

    def _move(self, move: Transfer, after: int, step: int) -> int:
        duration = move.ns(self.hardware, prefill=step == 0)
        if duration == 0:
            return after
        return self.engine.issue(
            "hop",
            f"→ {self.graph.layers[move.target].name}",
            lanes=(self._lane(move.origin, move.device),),
            duration_ns=duration,
            after=after,
            step=step,
        )

    def _fetch(self, run: LayerRun, part: Part, tokens: int, now: int, step: int) -> int:
        """Copy what the router asked for, or read what the CPU is about to use; return when it is there.

        What the CPU computes where it waits takes its time there, and the device waits.
        """
        home, kind = part.placement.home, part.placement.memory
        label = f"{run.name} {part.group.name}"
        if kind != "disk" and part.on_cpu(tokens):
            taken = cost.waiting_cpu_ns(
                self.hardware, part.group, home, run.device, waiting=part.waiting, tokens=tokens, dtype=self.dtype
            )
            lanes: tuple[str, ...] = (f"{home} compute",)
            return self.engine.issue("run", label, lanes=lanes, duration_ns=taken, after=now, step=step)
        taken = cost.waiting_copy_ns(
            self.hardware, part.group, home, run.device, kind, waiting=part.waiting, tokens=tokens
        )
        return self.engine.issue(
            "read" if kind == "disk" else "copy",
            label,
            lanes=self._lanes(home, run.device, kind),
            duration_ns=taken,
            after=now,
            step=step,
        )

    def _begin_prefetch(self) -> None:
        """Fill every slot: nothing is copied before the call begins."""
        for entry in self.plan.slots:
            if entry.holds != "groups":
                continue
            self.queue[entry.device] = list(prefetch_order(self.runs, entry.device))
            self.copied[entry.device] = []
            for _ in range(entry.count):
                self._prefetch(entry.device, 0, 0)

    def _prefetch(self, device: str, slot_free: int, step: int) -> None:
        """Copy the next group in the known, circular order into a slot that is free from the given instant."""
        if not self.queue.get(device):
            return
        part = self.queue[device].pop(0)
        self.queue[device].append(part)
        home, kind = part.placement.home, part.placement.memory
        end = self.engine.issue(
            "copy",
            f"{part.placement.layer} {part.group.name}",
            lanes=self._lanes(home, device, kind),
            duration_ns=cost.copy_ns(self.hardware, home, device, kind, cost.waiting_bytes(part.group, kind)),
            after=slot_free,
            step=step,
        )
        self.copied[device].append(end)

    def _lanes(self, home: str, device: str, kind: str) -> tuple[str, ...]:
        host = self.hardware.host(device)
        if kind == "disk":
            read = f"{home}→{host} read"
            return (read,) if device == host else (read, self._lane(host, device))
        return (self._lane(home, device),)

    def _lane(self, source: str, target: str) -> str:
        return self.hardware.link(source, target).lane or f"{source}→{target} copy"

    def _sample(self, now: int, device: str, usage: Usage, kv_cache: int = 0, activations: int = 0) -> None:
        self.samples.append(
            MemorySample(
                time_ns=now,
                device=device,
                weights=usage.weights,
                kv_cache=kv_cache,
                activations=activations,
                slots=usage.slots,
                workspace=usage.workspace,
                context=usage.context,
            )
        )


def _between(first: int, last: int, weight: float) -> int:
    return first + round((last - first) * weight)


def _at_both_ends(first: int, last: int) -> list[int]:
    """Return the numbers from `first` to `last`, of many only those at either end."""
    near = range(first, min(last, first + STEPS_AT_EACH_END - 1) + 1)
    return sorted({*near, *range(max(first, last - STEPS_AT_EACH_END + 1), last + 1)})


def _interpolate(simulated: dict[int, int], steps: int) -> list[int]:
    """Return every step's duration; those not simulated lie on the line between their simulated neighbours."""
    known = sorted(simulated)
    result = []
    for step in range(steps + 1):
        if step in simulated:
            result.append(simulated[step])
            continue
        below = max(k for k in known if k < step)
        above = min(k for k in known if k > step)
        result.append(_between(simulated[below], simulated[above], (step - below) / (above - below)))
    return result


def _order(interval: Interval) -> tuple[int, int, str, str]:
    return interval.start_ns, interval.end_ns, interval.lane, interval.label
