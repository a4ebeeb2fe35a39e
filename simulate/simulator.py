"""A Plan → the Timeline of one call: prefill, then decode steps with a growing cache.

Of many steps only some are simulated, and of these the first and last are kept interval by interval
(`simulate.series`). Calls of a prefill in chunks, which together are step 0, are treated alike.

What waits of experts is taken at its expected number per pass; with a seed it is drawn, pass by pass.

Operators are launched by the host, one after another, ahead of what they make a GPU do; the host waits at the end of a
step, for router ids that it reads, and while the CPU computes. Copies from and to host memory and what the CPU computes
share that memory (`planner.hardware.Shared`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planner import cost
from planner.chunks import chunks_of
from planner.errors import PlanFormatError
from planner.graph import Pass, Span
from planner.hardware import Hardware
from planner.host_cache import down_ns, host_layers, is_prefetched, up_ns
from planner.memory import Memory, Usage, static_usage
from planner.plan import Plan
from planner.steps import READ_AHEAD, LayerRun, Part, Transfer, layer_runs, prefetch_order
from simulate.engine import Action, After, Engine, Kind
from simulate.routing import Routing
from simulate.series import between, durations
from simulate.timeline import Interval, MemorySample, Timeline


def run(plan: Plan, *, seed: int | None = None) -> Timeline:
    """Simulate the plan's workload on its hardware, nothing else needed.

    seed: draws the experts that tokens are routed to; None: as many as are expected.

    Raises:
        PlanFormatError: the plan's graph has no pass for its workload.
    """
    return _Simulation(plan, seed).run()


def passes_of(plan: Plan) -> dict[str, Pass]:
    """Return the passes of the plan's graph by name.

    Raises:
        PlanFormatError: one that its workload needs is not there.
    """
    passes = {entry.name: entry for entry in plan.graph.passes}
    needed = [*chunks_of(plan.graph, plan.workload).named().values()]
    needed = ["prefill", *(name for name in needed if name != "prefill_last")]
    if plan.workload.decode_steps:
        needed.append("decode_first")
    missing = next((name for name in needed if name not in passes), None)
    if missing is not None:
        raise PlanFormatError(
            f"the plan's graph has no pass {missing!r}, which its work needs ({plan.workload.prompt_tokens} tokens in, "
            f"{plan.workload.new_tokens} out): plan again"
        )
    return passes


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


@dataclass(slots=True)
class _Kept:
    """A call whose intervals are kept: when it was simulated, and when it begins in the whole run."""

    step: int
    simulated_ns: int
    begins_ns: int = 0


@dataclass(frozen=True, slots=True)
class _Held:
    """What a device holds from the end of `after` on, or from the start of the call."""

    call: int
    after: After
    device: str
    usage: Usage
    kv_cache: int
    activations: int


class _Simulation:
    def __init__(self, plan: Plan, seed: int | None):
        self.passes = passes_of(plan)
        self.plan, self.graph, self.hardware = plan, plan.graph, plan.hardware
        self.routing = None if seed is None else Routing(seed)
        self.dtype = cost.weight_dtype(plan.graph)
        self.runs = layer_runs(plan.graph, plan.placements)
        self.static = static_usage(plan.graph, plan.hardware, plan.placements, plan.slots)
        self.users, capacities = _shared(plan.hardware)
        self.engine = Engine(capacities)
        self.leaves: dict[int, list[Transfer]] = {}
        for move in (move for run in self.runs for move in run.takes if not move.waits):
            self.leaves.setdefault(move.source, []).append(move)
        self.sent: dict[Transfer, After] = {}
        # Layers with a cache in host memory, and when it is there.
        self.on_host = sorted(host_layers(plan.graph))
        self.ups: dict[int, After] = {}
        # What each host's launches follow.
        self.launched: dict[str, After] = {}
        self.copied: dict[str, list[After]] = {}
        self.queue: dict[str, list[Part]] = {}
        # By device that computes from mapped files: what is to be read in this call, and what is on its way.
        self.unread: dict[str, list[Part]] = {}
        self.reading: dict[str, list[After]] = {}
        self.spans = {entry.name: entry.per_layer() for entry in plan.graph.passes}
        self.times: dict[tuple[int, str, bool], tuple[int, int]] = {}
        self.calls: list[_Kept] = []
        self.keeps = True
        self.actions: list[Action] = []
        self.held: list[_Held] = []

    def run(self) -> Timeline:
        steps = self.plan.workload.decode_steps
        chunks = chunks_of(self.graph, self.plan.workload)
        whole = chunks.whole - 1
        self.calls.append(_Kept(0, 0))
        for device, usage in self.static.items():
            self._hold((), device, usage)
        self._begin_prefetch()
        prefill = self._series(0, whole, lambda number: self._chunk(number, whole))
        if chunks.rest:
            prefill += self._series(0, 0, lambda _: _Call(0, self.passes["prefill_rest"], self.passes["prefill_rest"]))
        decode = self._series(1, steps, self._decode)
        # Copies that run ahead go on when the call has ended.
        self.engine.settle(tuple(self.actions))
        begins, stretches = 0, []
        for kept, taken in prefill + decode:
            if kept is not None:
                self.calls[kept].begins_ns = begins
                stretches.append((begins, begins + taken))
            begins += taken
        return Timeline(
            intervals=tuple(sorted(self._intervals(), key=_order)),
            memory=tuple(sorted(self._samples(), key=lambda sample: sample.time_ns)),
            simulated_steps=tuple(sorted({0} | {entry.step for entry in self.calls})),
            step_ns=(sum(taken for _, taken in prefill), *(taken for _, taken in decode)),
            kept_ns=tuple(stretches),
        )

    def _series(self, first: int, last: int, call_of: Callable[[int], _Call]) -> list[tuple[int | None, int]]:
        """Return for each number which kept call it is, if any, and how long it takes in ns."""
        kept: dict[int, int] = {}

        def simulate(number: int, *, keep: bool) -> int:
            if keep:
                kept[number] = len(self.calls)
            return self._simulate(call_of(number), kept=keep)

        drawn = self.routing is not None and any(p.waiting and p.group.slices > 1 for r in self.runs for p in r.parts)
        taken = durations(first, last, simulate, drawn=drawn, rounding_ns=len(self.runs))
        return [(kept.get(number), each) for number, each in enumerate(taken, start=first)]

    def _simulate(self, call: _Call, *, kept: bool) -> int:
        started = self.engine.clock_ns
        self.keeps = kept
        if kept:
            self.calls.append(_Kept(call.step, started))
        return self.engine.settle(self._call(call)) - started

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

    def _call(self, call: _Call) -> After:
        """Issue one call, which begins now; return what it ends with."""
        now: After = ()
        self.launched = {}
        self.unread = {}
        for run in self.runs:
            self.unread.setdefault(run.device, []).extend(part for part in run.parts if part.read_ahead)
        self.reading = {device: [] for device in self.unread}
        for device in self.unread:
            for _ in range(READ_AHEAD):
                self._read_ahead(device, now)
        first, last, weight = self.spans[call.first.name], self.spans[call.last.name], call.weight
        cached: dict[str, int] = dict.fromkeys(self.static, 0)
        for run in self.runs:
            cached[run.device] += between(first[run.index].kv_before_bytes, last[run.index].kv_before_bytes, weight)
            if last[run.index].kv_host_bytes:
                cached[self.hardware.host(run.device)] += between(
                    first[run.index].kv_host_bytes, last[run.index].kv_host_bytes, weight
                )
        for host in sorted({self.hardware.host(run.device) for run in self.runs if last[run.index].kv_host_bytes}):
            self._hold(now, host, self.static[host], cached[host])
        for run in self.runs:
            span, other = first[run.index], last[run.index]
            now = self._take(run, now, call)
            held = between(span.requested_bytes, other.requested_bytes, weight)
            self._hold(now, run.device, self.static[run.device], cached[run.device], held)
            now = self._layer(run, call, now)
            cached[run.device] += between(
                span.kv_after_bytes - span.kv_before_bytes, other.kv_after_bytes - other.kv_before_bytes, weight
            )
            self._hold(now, run.device, self.static[run.device], cached[run.device], 0)
            self._send(run, now, call)
        return now

    def _layer(self, run: LayerRun, call: _Call, now: After) -> After:
        tokens = call.first.tokens * self.graph.batch_size
        computing, launching, read = self._work(run, call)
        now = self._bring_cache(run, call, now)
        pending, pending_launches = 0, 0
        for part in run.parts:
            own, launches = round(computing * part.share), launching // len(run.parts)
            if part.read_ahead:
                now = self._run(run, "", pending, 0, read, now)
                ready = self.reading[run.device].pop(0)
                self._read_ahead(run.device, now)
                now = self._run(run, part.group.name, own, 0, read, (*now, *ready))
                pending = 0
            elif part.waiting and not part.prefetched:
                now = self._run(run, "", pending, pending_launches, read, now)
                # The host has read what the router chose, and goes on when the copies are under way.
                self.launched[self.hardware.host(run.device)] = now
                now = self._fetch(run, part, tokens, now)
                now = self._run(run, part.group.name, own, launches, read, now)
                pending, pending_launches = 0, 0
            elif part.prefetched:
                ready = self.copied[run.device].pop(0)
                launches += pending_launches
                now = self._run(run, part.group.name, pending + own, launches, read, (*now, *ready))
                self._prefetch(run.device, now)
                pending, pending_launches = 0, 0
            else:
                pending += own
                pending_launches += launches
        return self._run(run, "", pending, pending_launches, read, now)

    def _work(self, run: LayerRun, call: _Call) -> tuple[int, int, int]:
        """Return how long a layer computes and is launched, in ns, and the bytes per second that it reads and writes.

        What was measured has its launches in it. A CPU launches what it computes itself.
        """
        device = self.hardware.device(run.device)
        begun, ended = (self._time(run.index, run.device, entry, call.prefill) for entry in (call.first, call.last))
        taken = between(begun[0], ended[0], call.weight)
        launching = between(begun[1], ended[1], call.weight)
        span = self.spans[call.first.name][run.index]
        tokens = call.first.tokens * self.graph.batch_size
        moved = span.moved_bytes + sum(
            int(group.expected_slices(tokens) * group.nbytes / group.slices)
            for group in self.graph.kind_of(run.index).groups
            if group.slices > 1
        )
        rate = min(device.bytes_per_s, moved * 10**9 // taken) if taken else 0
        return taken, launching, rate

    def _time(self, index: int, name: str, entry: Pass, prefill: bool) -> tuple[int, int]:
        known = self.times.get((index, entry.name, prefill))
        if known is not None:
            return known
        device, span = self.hardware.device(name), self.spans[entry.name][index]
        launching = 0
        if device.kind != "cpu" and self.graph.measured_ns(index, name, prefill=prefill) is None:
            launching = span.operators * device.operator_ns
            device = dataclasses.replace(device, operator_ns=0)
        taken = cost.layer_ns(
            self.graph, index, span, device, tokens=entry.tokens * self.graph.batch_size, dtype=self.dtype,
            prefill=prefill,
        )  # fmt: skip
        self.times[index, entry.name, prefill] = taken, launching
        return taken, launching

    def _bring_cache(self, run: LayerRun, call: _Call, now: After) -> After:
        """Copy a layer's cache to host memory, and begin to bring the next one's; return what computing follows.

        Where the next one's device is not one that it is prefetched to, it is brought up when its layer begins.
        """
        if run.index not in self.on_host:
            return now
        # The first layer's is begun while the last one of the call before runs.
        now = (*now, *(self.ups.pop(run.index) if run.index in self.ups else self._up(run, call, now)))
        at = self.on_host.index(run.index) + 1
        following = self.on_host[at] if at < len(self.on_host) else self.on_host[0]
        if is_prefetched(self.hardware, self.runs[following].device):
            self.ups[following] = self._up(self.runs[following], call, now, growing=at == len(self.on_host))
        return self._cache_copy(run, call, down_ns, now, up=False)

    def _up(self, run: LayerRun, call: _Call, after: After, *, growing: bool = False) -> After:
        """Bring a layer's cache up; `growing`: for the next call, with what this one has added to it."""
        if growing:
            return self._cache_copy(run, call, down_ns, after, up=True)
        return self._cache_copy(run, call, up_ns, after, up=True)

    def _cache_copy(
        self, run: LayerRun, call: _Call, priced: Callable[[Hardware, Span, str], int], after: After, *, up: bool
    ) -> After:
        first, last = (self.spans[entry.name][run.index] for entry in (call.first, call.last))
        host, device = self.hardware.host(run.device), run.device
        duration = between(priced(self.hardware, first, device), priced(self.hardware, last, device), call.weight)
        ends = (host, device) if up else (device, host)
        waits = not (up and is_prefetched(self.hardware, device))
        lanes = (self._lane(*ends), f"{device} compute") if waits else (self._lane(*ends),)
        return self._issue("copy", f"{run.name} cache", lanes, duration, after, self._draws(*ends))

    def _run(self, run: LayerRun, part: str, duration: int, launching: int, read: int, after: After) -> After:
        label, host = f"{run.name} {part}".strip(), self.hardware.host(run.device)
        launched = self.launched.get(host, ())
        draws = [(name, read) for name in self.users.get(run.device, ())]
        ended = self._issue("run", label, (f"{run.device} compute",), duration, (*after, *launched), draws)
        if launching:
            launches = self._issue("launch", label, (f"{host} launches",), launching, launched)
            self.launched[host] = launches
            return (*ended, *launches)
        if self.hardware.device(run.device).kind == "cpu":
            self.launched[host] = ended
        return ended

    def _take(self, run: LayerRun, now: After, call: _Call) -> After:
        """Bring what other devices made and this layer is the first here to take; return what it follows."""
        ready = tuple(action for move in run.takes for action in self.sent.pop(move, ()))
        for move in run.takes:
            if move.waits:
                now = self._move(move, now, call)
        return (*now, *ready)

    def _send(self, run: LayerRun, now: After, call: _Call) -> None:
        """Send what a layer made and nothing waits for: it is under way before it is taken."""
        for move in self.leaves.get(run.index, ()):
            self.sent[move] = self._move(move, now, call)

    def _move(self, move: Transfer, after: After, call: _Call) -> After:
        label = f"→ {self.graph.layers[move.target].name}"
        duration = move.ns(self.hardware, prefill=call.prefill)
        ends = (move.origin, move.device)
        return self._issue("hop", label, (self._lane(*ends),), duration, after, self._draws(*ends))

    def _fetch(self, run: LayerRun, part: Part, tokens: int, now: After) -> After:
        """Copy what the router asked for, or read what the CPU is about to use; return what computing follows.

        What the CPU computes where it waits takes its time there, and the device waits.
        """
        home, kind = part.placement.home, part.placement.memory
        label = f"{run.name} {part.group.name}"
        on_cpu = kind != "disk" and part.on_cpu(tokens)
        for taken, uses in self._fetches(run, part, tokens, on_cpu=on_cpu):
            most = self._reading(part, run.device, taken, uses, on_cpu=on_cpu)
            if on_cpu:
                draws = [(name, most) for name in self.users.get(home, ())]
                now = self._issue("run", label, (f"{home} compute",), taken, now, draws)
                self.launched[home] = now
            else:
                lanes, draws = self._way(home, run.device, kind)
                if cost.reads_rows(self.hardware, part.group, run.device, kind):
                    # They do not queue behind the groups that are read ahead.
                    lanes = tuple(f"{lane} of rows" for lane in lanes)
                draws = [(name, min(most, rate)) for name, rate in draws]
                now = self._issue("read" if kind == "disk" else "copy", label, lanes, taken, now, draws)
        return now

    def _reading(self, part: Part, device: str, taken: int, uses: float, *, on_cpu: bool) -> int:
        """Return the bytes per second that using slices so often reads, but for latencies: what multiplies for longer
        than it reads, or reads mapped files, draws less than it could.
        """
        home, kind = part.placement.home, part.placement.memory
        if on_cpu:
            most, nbytes = self.hardware.device(home).bytes_per_s, part.group.slice_slab_bytes
            latency = self.hardware.link(home, device).latency_ns + self.hardware.link(device, home).latency_ns
        else:
            most, latency = cost.path_rate(self.hardware, home, device, kind)
            nbytes = cost.waiting_bytes(part.group, kind)
        return min(most, int(uses * nbytes * 10**9 / max(taken - uses * latency, 1)))

    def _fetches(self, run: LayerRun, part: Part, tokens: int, *, on_cpu: bool) -> Iterator[tuple[int, float]]:
        """Yield how long each copy of slices takes, or their computing by the CPU, in ns, and how many that are."""
        group, home, memory = part.group, part.placement.home, part.placement.memory
        if self.routing is None or group.slices == 1:
            if on_cpu:
                taken = cost.waiting_cpu_ns(
                    self.hardware, group, home, run.device, waiting=part.waiting, tokens=tokens, dtype=self.dtype
                )  # fmt: skip
            else:
                taken = cost.waiting_copy_ns(
                    self.hardware, group, home, run.device, memory, waiting=part.waiting, tokens=tokens
                )
            yield taken, sum(count * group.used(bucket, tokens) for count, bucket in group.waiting(part.waiting))
            return
        whole = cost.once_ns(self.hardware, group, home, run.device, memory)
        for bucket in self.routing.waiting(group, waiting=part.waiting, tokens=tokens):
            if on_cpu:
                expected = cost.slice_cpu_ns(
                    self.hardware, group, bucket, home, run.device, tokens=tokens, dtype=self.dtype
                )  # fmt: skip
                yield round(expected / group.used(bucket, tokens)), 1
            else:
                yield whole, 1

    def _begin_prefetch(self) -> None:
        """Fill every slot: nothing is copied before the call begins."""
        for entry in self.plan.slots:
            if entry.holds != "groups":
                continue
            self.queue[entry.device] = list(prefetch_order(self.runs, entry.device))
            self.copied[entry.device] = []
            for _ in range(entry.count):
                self._prefetch(entry.device, ())

    def _prefetch(self, device: str, slot_free: After) -> None:
        """Copy the next group in the known, circular order into a slot that is free when `slot_free` has ended."""
        if not self.queue.get(device):
            return
        part = self.queue[device].pop(0)
        self.queue[device].append(part)
        home, kind = part.placement.home, part.placement.memory
        lanes, draws = self._way(home, device, kind)
        taken = cost.copy_ns(self.hardware, home, device, kind, cost.waiting_bytes(part.group, kind))
        label = f"{part.placement.layer} {part.group.name}"
        self.copied[device].append(self._issue("copy", label, lanes, taken, slot_free, draws))

    def _read_ahead(self, device: str, after: After) -> None:
        """Bring the next group of a mapped file that the CPU computes with in this call."""
        if not self.unread[device]:
            return
        part = self.unread[device].pop(0)
        home = part.placement.home
        lanes, draws = self._way(home, device, "disk")
        taken = cost.waiting_copy_ns(self.hardware, part.group, home, device, "disk", waiting=part.waiting, tokens=1)
        most = self._reading(part, device, taken, 1, on_cpu=False)
        draws = [(name, min(most, rate)) for name, rate in draws]
        label = f"{part.placement.layer} {part.group.name}"
        self.reading[device].append(self._issue("read", label, lanes, taken, after, draws))

    def _way(self, home: str, device: str, kind: Memory) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
        """Return the lanes of a copy, and what it draws from what they share."""
        host = self.hardware.host(device)
        rate, _ = cost.path_rate(self.hardware, home, device, kind)
        if kind != "disk":
            return (self._lane(home, device),), self._draws(home, device, rate)
        read = self.hardware.link(home, host).lane or f"{home}→{host} read"
        if device == host:
            return (read,), self._draws(home, host, rate)
        return (read, self._lane(host, device)), self._draws(home, host, rate) + self._draws(host, device, rate)

    def _draws(self, source: str, target: str, rate: int | None = None) -> list[tuple[str, int]]:
        asked = self.hardware.link(source, target).bytes_per_s if rate is None else rate
        return [
            (name, asked)
            for link in self.hardware.way(source, target)
            for name in self.users.get(f"{link.source}→{link.target}", ())
        ]

    def _lane(self, source: str, target: str) -> str:
        return self.hardware.link(source, target).lane or f"{source}→{target} copy"

    def _issue(
        self, kind: Kind, label: str, lanes: tuple[str, ...], duration: int, after: After,
        draws: list[tuple[str, int]] | None = None,
    ) -> After:  # fmt: skip
        """Issue an action; one that takes no time is left out, and what it would follow is returned."""
        if duration == 0:
            return after
        call = len(self.calls) - 1
        action = self.engine.issue(
            kind, label, lanes=lanes, duration_ns=duration, after=after, call=call, draws=draws or ()
        )
        if self.keeps:
            self.actions.append(action)
        return (action,)

    def _hold(self, after: After, device: str, usage: Usage, kv_cache: int = 0, activations: int = 0) -> None:
        if self.keeps:
            self.held.append(_Held(len(self.calls) - 1, after, device, usage, kv_cache, activations))

    def _intervals(self) -> Iterator[Interval]:
        for action in self.actions:
            assert action.start_ns is not None
            assert action.end_ns is not None
            call = self.calls[action.call]
            shift = call.begins_ns - call.simulated_ns
            for lane in action.lanes:
                yield Interval(
                    lane=lane, start_ns=action.start_ns + shift, end_ns=action.end_ns + shift, action=action.kind,
                    label=action.label, step=call.step,
                )  # fmt: skip

    def _samples(self) -> Iterator[MemorySample]:
        for held in self.held:
            call = self.calls[held.call]
            ended = max((action.end_ns or 0 for action in held.after), default=call.simulated_ns)
            yield MemorySample(
                time_ns=max(ended, call.simulated_ns) + call.begins_ns - call.simulated_ns,
                device=held.device,
                weights=held.usage.weights,
                kv_cache=held.kv_cache,
                activations=held.activations,
                slots=held.usage.slots,
                workspace=held.usage.workspace,
                context=held.usage.context,
            )


def _shared(hardware: Hardware) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return what each user shares with others, and the bytes per second of all that is shared."""
    named = {
        entry.name: entry for entry in (*map(hardware.memory_of, [h.name for h in hardware.hosts]), *hardware.shared)
    }
    users: dict[str, list[str]] = {}
    for entry in named.values():
        for user in entry.users:
            users.setdefault(user, []).append(entry.name)
    return users, {name: entry.bytes_per_s for name, entry in named.items()}


def _order(interval: Interval) -> tuple[int, int, str, str]:
    return interval.start_ns, interval.end_ns, interval.lane, interval.label
