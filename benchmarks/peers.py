"""How others would place a model: their maps as our placements, so that one simulator times them all.

A peer is asked for placements; where it has none that fits, it says why. A map fits where no memory holds more than
its usable capacity as `planner.memory` counts it: weights, slots, caches, activations, workspace and context. Only
placement differs: what waits elsewhere is streamed by our engine, also for peers whose own is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import simulate
from planner import memory
from planner.accelerate_map import quiet
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.plan import SCHEMA_VERSION, Execution, ModelInfo, Placement, Plan, Slots, Solver
from planner.rules import NO_RULES, Rules
from planner.units import format_bytes
from planner.verify import verify_plan
from planner.workload import Workload

# Rounds in which accelerate is told to leave more room, and the least it is told to leave more in each.
_ROUNDS = 60
_LEAST_ROOM = 1 / 100


class NoMapError(Exception):
    """A peer has no map, or none that fits; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be placed, and where. model: on meta; None for a graph that was never one."""

    graph: LayerGraph
    hardware: Hardware
    workload: Workload
    model: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """A layer's device, and the place where what may wait elsewhere waits."""

    run_on: str
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A peer's simulated time of the whole call, or why there is none."""

    simulated_ns: int | None
    why: str | None


Peer = Callable[[Task], tuple[Placement, ...]]


def scores(task: Task, *, only: Sequence[str] | None = None) -> dict[str, Score]:
    """Return every peer's score by its name."""
    return {name: score(task, peer) for name, peer in PEERS.items() if only is None or name in only}


def score(task: Task, peer: Peer) -> Score:
    """Return the simulated time of a peer's placement; a peer that fails has none."""
    try:
        placements = peer(task)
        excess = excess_bytes(task, placements)
        if excess:
            words = ", ".join(f"{name} by {format_bytes(size)}" for name, size in sorted(excess.items()))
            raise NoMapError(f"its map overfills {words}")
        plan = plan_of(task, placements)
        broken = verify_plan(plan)
        if broken:
            raise NoMapError(f"its map breaks a rule: {broken[0].message}")
        return Score(simulated_ns=simulate.run(plan).total_ns, why=None)
    except NoMapError as exc:
        return Score(simulated_ns=None, why=str(exc))
    except Exception as exc:  # a peer's own fault must not end the benchmark
        return Score(simulated_ns=None, why=f"it failed: {type(exc).__name__}: {exc}")


# Maps as placements


def plan_of(
    task: Task,
    placements: Sequence[Placement],
    *,
    slots: Sequence[Slots] | None = None,
    solver: Solver | None = None,
    rules: Rules = NO_RULES,
) -> Plan:
    """Return a plan with these placements, and with the slots they need where none are given; it has no prediction."""
    graph = task.graph
    if slots is None:
        slots = memory.needed_slots(graph, task.hardware, placements)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id=graph.model, source="config", note="", revision=None, config_digest=None, weight_dtype="bfloat16",
            num_parameters=graph.num_parameters, weight_bytes=graph.weight_bytes, versions={},
        ),
        graph=graph, hardware=task.hardware, workload=task.workload, rules=rules,
        execution=Execution(attention=None, experts=None), assumptions=(), placements=tuple(placements),
        slots=tuple(slots), prediction=None, solver=solver,
    )  # fmt: skip


def placements_of(task: Task, wheres: Sequence[Where]) -> tuple[Placement, ...]:
    """Return every group of every layer as its layer's place says; what must not wait elsewhere stays where it runs."""
    placements = []
    for layer, where in zip(task.graph.layers, wheres, strict=True):
        for group in task.graph.kinds[layer.kind].groups:
            may_wait = group.streamable or task.hardware.device(where.run_on).kind == "cpu"
            home = where.home if may_wait else where.run_on
            kept = group.slices if home == where.run_on else 0
            placements.append(
                Placement(
                    layer=layer.name,
                    group=group.name,
                    home=home,
                    memory=_memory(task.hardware, home, where.run_on),
                    run_on=where.run_on,
                    nbytes=group.nbytes,
                    resident_slices=kept if group.slices > 1 else None,
                )
            )
    return tuple(placements)


def _memory(hardware: Hardware, home: str, run_on: str) -> Literal["device", "pinned", "pageable", "disk"]:
    if home == hardware.disk(home):
        return "disk"
    if home != hardware.host(home):
        return "device"
    return "pageable" if home == run_on else "pinned"


def excess_bytes(task: Task, placements: Sequence[Placement]) -> dict[str, int]:
    """Return {memory: bytes beyond its usable capacity}, "pinned" among them, for those that are overfull."""
    graph, hardware = task.graph, task.hardware
    slots = memory.needed_slots(graph, hardware, placements)
    planned = memory.planned_bytes(graph, hardware, placements, slots)
    excess = {pool.name: planned[pool.name].total - pool.usable_bytes for pool in hardware.pools}
    if hardware.pinned_limit_bytes is not None:
        pinned = memory.pinned_bytes(graph, hardware, placements, slots)
        excess["pinned"] = pinned - hardware.pinned_limit_bytes
    return {name: size for name, size in excess.items() if size > 0}


# Accelerate


def accelerate_peer(kind: Literal["auto", "balanced", "sequential"], *, told: bool = False) -> Peer:
    """Return the peer that asks transformers for the map of `device_map=kind`, with our capacities as `max_memory`.

    told: where its map overfills a memory, it is told to leave more room there, and asked again.
    """

    def place(task: Task) -> tuple[Placement, ...]:
        caps = max_memory_of(task.hardware)
        keys: dict[str, int | str] = {gpu.pool: index for index, gpu in enumerate(task.hardware.gpus)}
        keys[_main_host(task.hardware)] = "cpu"
        for _ in range(_ROUNDS if told else 1):
            placements = placements_of(task, wheres_of(task, device_map(task, kind, caps)))
            excess = {keys[name]: size for name, size in excess_bytes(task, placements).items() if name in keys}
            if not told or not excess:
                return placements
            for key, size in excess.items():
                caps[key] = max(0, caps[key] - max(size, int(caps[key] * _LEAST_ROOM)))
        raise NoMapError(f"its map overfills a memory, however often it is told to leave room ({_ROUNDS} times)")

    return place


def max_memory_of(hardware: Hardware) -> dict[int | str, int]:
    """Return the usable capacities as accelerate takes them; of several nodes it sees the first one's host."""
    caps: dict[int | str, int] = {
        index: hardware.pool(gpu.pool).usable_bytes for index, gpu in enumerate(hardware.gpus)
    }
    caps["cpu"] = hardware.pool(_main_host(hardware)).usable_bytes
    return caps


def _main_host(hardware: Hardware) -> str:
    return hardware.host(hardware.devices[0].name)


def device_map(task: Task, kind: str, caps: dict[int | str, int]) -> dict[str, int | str]:
    """Return what `from_pretrained(device_map=kind, max_memory=caps)` makes of the model: module → GPU, cpu or disk."""
    try:
        import accelerate  # noqa: F401  transformers reports its absence far less plainly
        from transformers.integrations.accelerate import _get_device_map
    except ImportError as exc:
        raise NoMapError("accelerate is not installed") from exc
    model = task.model if task.model is not None else module_of(task.graph)
    with quiet():
        return dict(_get_device_map(model, kind, dict(caps), None))


def wheres_of(task: Task, mapped: dict[str, int | str]) -> tuple[Where, ...]:
    """Return each layer's place under a device map; offloaded modules run on the main device, as its hooks do it.

    Raises:
        NoMapError: the map leaves a layer out, or puts tensors of one layer in several places.
    """
    gpus = [device for device in mapped.values() if isinstance(device, int)]
    host = _main_host(task.hardware)
    main = task.hardware.gpus[min(gpus)].name if gpus else host
    tensors: dict[int, list[str]] = {}
    for index, _, name, _ in task.graph.tensors():
        tensors.setdefault(index, []).append(name)
    result = []
    for index, layer in enumerate(task.graph.layers):
        places = {_mapped_to(mapped, name) for name in tensors.get(index, [layer.name])}
        if len(places) > 1:
            raise NoMapError(f"its map splits {layer.name or 'the model'}, which is one layer here")
        (place,) = places
        if place is None:
            raise NoMapError(f"its map leaves {layer.name} out")
        if isinstance(place, int):
            name = task.hardware.gpus[place].name
            result.append(Where(run_on=name, home=name))
        else:
            home = host if place == "cpu" else task.hardware.disk(host)
            result.append(Where(run_on=main, home=home))
    return tuple(result)


def _mapped_to(mapped: dict[str, int | str], name: str) -> int | str | None:
    """Return what the map says of a tensor: the entry of the longest path above it."""
    while name not in mapped and name:
        name = name.rpartition(".")[0]
    return mapped.get(name)


def module_of(graph: LayerGraph) -> Any:
    """Return a module on meta with a graph's layers and tensors, for maps that are made from modules."""
    import torch

    class GraphLayer(torch.nn.Module):
        """A layer that may not be split."""

    root = torch.nn.Module()
    made: dict[str, Any] = {}
    tied = graph.tied_to_earlier()
    for layer in graph.layers:
        owner = root
        *above, last = layer.name.split(".")
        for part in above:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, GraphLayer())
    for index, _, name, tensor in graph.tensors():
        value = made.get(tied.get(name, name))
        if value is None:
            empty = torch.empty(tensor.nbytes, dtype=torch.uint8, device="meta")
            value = made[name] = torch.nn.Parameter(empty, requires_grad=False)
        owner = root.get_submodule(graph.layers[index].name)
        owner.register_parameter(tensor.name.replace(".", "_"), value)
    # What transformers reads of a model besides its modules.
    shared = {_flat(graph, name): _flat(graph, first) for name, first in tied.items()}
    vars(root).update(_no_split_modules=["GraphLayer"], all_tied_weights_keys=shared)
    return root


def _flat(graph: LayerGraph, name: str) -> str:
    layer = next(layer.name for layer in graph.layers if name.startswith(f"{layer.name}."))
    return f"{layer}.{name.removeprefix(layer + '.').replace('.', '_')}"


# exo


def exo_proportional(task: Task) -> tuple[Placement, ...]:
    """exo since 1.0: blocks over all GPUs in proportion to memory by the largest remainder, at least one each."""
    return _in_stretches(task, [gpu.name for gpu in task.hardware.gpus])


def exo_fewest(task: Task) -> tuple[Placement, ...]:
    """The same over as few GPUs as hold the weights together, the largest first, as exo chooses its cycle."""
    order = _largest_first(task.hardware)
    room = 0
    for count, name in enumerate(order, start=1):
        room += task.hardware.pool(name).usable_bytes
        if room >= task.graph.weight_bytes:
            return _in_stretches(task, sorted(order[:count], key=[gpu.name for gpu in task.hardware.gpus].index))
    raise NoMapError("the GPUs together hold less than the weights, and it offloads nothing")


def exo_ring(task: Task) -> tuple[Placement, ...]:
    """exo before 1.0: a ring of GPUs, the largest first, each with the share of the blocks that its memory is."""
    order = _largest_first(task.hardware)
    blocks = _blocks(task.graph)
    ends = ring_shares(len(blocks), [task.hardware.pool(name).usable_bytes for name in order])
    return _with_blocks(task, [name for name, size in zip(order, ends, strict=True) for _ in range(size)])


def _in_stretches(task: Task, names: Sequence[str]) -> tuple[Placement, ...]:
    sizes = proportional(len(_blocks(task.graph)), [task.hardware.pool(name).usable_bytes for name in names])
    return _with_blocks(task, [name for name, size in zip(names, sizes, strict=True) for _ in range(size)])


def proportional(layers: int, capacities: Sequence[int]) -> list[int]:
    """Return how many of `layers` each of `capacities` takes: its share rounded down, those left to the largest
    remainders, and one at least, taken from whoever has most.

    Raises:
        NoMapError: there are fewer layers than capacities, or nothing to share them over.
    """
    total = sum(capacities)
    if not total or layers < len(capacities):
        raise NoMapError(f"it cannot share {layers} layers over {len(capacities)} GPUs")
    sizes = [layers * capacity // total for capacity in capacities]
    remainders = [layers * capacity % total for capacity in capacities]
    for index in sorted(range(len(sizes)), key=lambda i: (-remainders[i], i))[: layers - sum(sizes)]:
        sizes[index] += 1
    for index, size in enumerate(sizes):
        if size == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[index] = 1
    return sizes


def ring_shares(layers: int, capacities: Sequence[int]) -> list[int]:
    """Return how many of `layers` each of `capacities` takes where running shares are rounded to five digits and cut
    down to whole layers, and the last takes what is left.

    Raises:
        NoMapError: there is nothing to share them over.
    """
    total = sum(capacities)
    if not total:
        raise NoMapError("it shares layers over GPUs, and there are none")
    share, done = 0.0, 0
    sizes: list[int] = []
    for capacity in capacities:
        share = round(share + capacity / total, 5)
        end = layers if len(sizes) == len(capacities) - 1 else min(int(share * layers), layers)
        sizes.append(end - done)
        done = end
    return sizes


def _largest_first(hardware: Hardware) -> list[str]:
    names = [gpu.name for gpu in hardware.gpus]
    return sorted(names, key=lambda name: -hardware.pool(name).usable_bytes)


def _blocks(graph: LayerGraph) -> list[int]:
    """Return the layers that are shared out; others (embeddings, norms, heads) go with a neighbour."""
    found = [i for i in range(len(graph.layers)) if any(group.streamable for group in graph.kind_of(i).groups)]
    return found or list(range(len(graph.layers)))


def _with_blocks(task: Task, names: Sequence[str]) -> tuple[Placement, ...]:
    """Return all of the model on GPUs: the blocks as named, other layers with the block before them, or the first."""
    by_block = dict(zip(_blocks(task.graph), names, strict=True))
    current, wheres = names[0], []
    for index in range(len(task.graph.layers)):
        current = by_block.get(index, current)
        wheres.append(Where(run_on=current, home=current))
    return placements_of(task, wheres)


# Greedy by layer


def greedy(task: Task) -> tuple[Placement, ...]:
    """Fill GPU after GPU with whole layers, by exact bytes; what is left runs on the last GPU, streamed from host
    memory and, where that is full, from disk. Without a GPU, the host is the one to fill.
    """
    hardware, count = task.hardware, len(task.graph.layers)
    host = _main_host(hardware)
    wheres = [Where(run_on=host, home=host)] * count
    if not hardware.gpus:
        return _filled(task, wheres, 0, host)
    done = start = 0
    for gpu in hardware.gpus:
        start = done
        while done < count:
            tried = [*wheres[:done], Where(run_on=gpu.name, home=gpu.name), *wheres[done + 1 :]]
            if gpu.pool in excess_bytes(task, placements_of(task, tried)):
                break
            wheres, done = tried, done + 1
    if done == count:
        return placements_of(task, wheres)
    last = hardware.gpus[-1]

    def with_kept(kept: int) -> list[Where]:
        split = start + kept
        stay = [Where(run_on=last.name, home=last.name)] * kept
        return [*wheres[:start], *stay, *[Where(run_on=last.name, home=hardware.host(last.name))] * (count - split)]

    kept = _most(done - start, lambda n: last.pool not in excess_bytes(task, placements_of(task, with_kept(n))))
    if kept is None:
        raise NoMapError(f"{last.name} cannot run the layers that are left, even with all of them waiting elsewhere")
    return _filled(task, with_kept(kept), start + kept, last.name)


def _filled(task: Task, wheres: Sequence[Where], first: int, run_on: str) -> tuple[Placement, ...]:
    """Return the placement where layers from `first` on wait in host memory while they fit, and then on disk."""
    host, disk = task.hardware.host(run_on), task.hardware.disk(run_on)
    left = len(wheres) - first

    def with_in_ram(number: int) -> tuple[Placement, ...]:
        in_ram = [Where(run_on=run_on, home=host)] * number
        return placements_of(task, [*wheres[:first], *in_ram, *[Where(run_on=run_on, home=disk)] * (left - number)])

    number = _most(left, lambda n: host not in excess_bytes(task, with_in_ram(n)))
    if number is None:
        raise NoMapError("host memory is too small even with every layer that may wait on disk there")
    return with_in_ram(number)


def _most(limit: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number up to `limit` that fits, or None; what fits, fits with fewer too."""
    if fits(limit):
        return limit
    low, high = -1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return None if low < 0 else low


PEERS: dict[str, Peer] = {
    "accelerate auto": accelerate_peer("auto"),
    "accelerate balanced": accelerate_peer("balanced"),
    "accelerate sequential": accelerate_peer("sequential"),
    "accelerate auto, told to leave room": accelerate_peer("auto", told=True),
    "accelerate sequential, told to leave room": accelerate_peer("sequential", told=True),
    "exo proportional": exo_proportional,
    "exo fewest GPUs": exo_fewest,
    "exo ring": exo_ring,
    "greedy by layer": greedy,
}
