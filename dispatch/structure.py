"""A plan read off a module tree and a device map. Nothing is traced: it says where all goes, and predicts nothing.

A layer of it is a module that owns tensors, itself or in children that cannot be called, and not a block of the map:
weights are used where they are owned, whatever a map cuts through, and a module that waits is copied when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn.parameter import is_lazy

from dispatch import place
from planner.device_map import MAPPED, DeviceMap, placed
from planner.errors import InputError
from planner.graph import Layer, LayerGraph, LayerKind, Tensor, WeightGroup, full_name
from planner.hardware import Device, Hardware, MemoryPool
from planner.memory import needed_slots
from planner.plan import SCHEMA_VERSION, Execution, ModelInfo, Placement, Plan
from planner.rules import NO_RULES
from planner.workload import Workload

Place = int | str | torch.device
# What waits of a module, and its tensors that stay where it runs.
_WEIGHTS, _STAYING = "", "staying buffers"
# Modules of torch that compute with their children's weights without calling them.
_UNCALLED = (torch.nn.MultiheadAttention,)


def plan_of(
    model: torch.nn.Module,
    device_map: Mapping[str, Place],
    *,
    main_device: Place | None = None,
    buffers_wait: bool = False,
    whole: Collection[str] = (),
) -> Plan:
    """Return the plan that puts a model's tensors where a device map says.

    main_device: runs what the map has on "cpu" and "disk"; None: the first GPU of the map, else the CPU.
    buffers_wait: persistent buffers wait with the parameters of their module. whole: classes of modules that are one
        group with all that is below them, because their children are not called.

    Raises:
        InputError: the map leaves a parameter out, names what is not there, or splits a module between two GPUs.
    """
    mapped = _read(device_map, main_device)
    units = tuple(_units(model, whole))
    hardware = _hardware([*mapped.entries.values(), mapped.main])
    graph = _graph(model, units, lambda name, tensor: False)
    mapped.check_names(graph, [name for name, _ in model.named_modules(remove_duplicate=False)])
    mapped.places(graph)
    # What is changed in one place would not be in others that it waits in.
    tied = {name for names in graph.ties for name in names}
    graph = _graph(
        model,
        units,
        lambda name, tensor: tensor.buffer and not (buffers_wait and tensor.persistent and name not in tied),
    )
    placements, _ = placed(graph, hardware, mapped)
    placements = tuple(_staying(entry) if entry.group == _STAYING else entry for entry in placements)
    sizes = [tensor.nbytes for _, _, _, tensor in graph.tensors()]
    dtypes = [tensor.dtype for _, _, _, tensor in graph.tensors() if not tensor.buffer]
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id=type(model).__name__,
            source="module",
            note=MAPPED,
            revision=None,
            config_digest=None,
            weight_dtype=max(dtypes, key=dtypes.count, default="float32"),
            num_parameters=graph.num_parameters,
            weight_bytes=graph.weight_bytes,
            versions={"torch": torch.__version__},
            loaded=not any(tensor.is_meta for _, tensor in place.named_tensors(model)) and bool(sizes),
        ),
        graph=graph,
        hardware=hardware,
        workload=Workload(caller="forward", new_tokens=1),
        rules=NO_RULES,
        execution=Execution(attention=None, experts=None),
        assumptions=(),
        placements=placements,
        slots=needed_slots(graph, hardware, placements),
        prediction=None,
        solver=None,
    )


def place_name(given: Place) -> str:
    """Return what a plan calls a place of a device map: 0 is "cuda:0", or what this machine's accelerators are called.

    Raises:
        InputError: it is no device.
    """
    if isinstance(given, str) and given.strip() in ("cpu", "disk"):
        return given.strip()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if accelerator is None else accelerator.type
    try:
        if isinstance(given, bool) or (isinstance(given, int) and given < 0):
            raise ValueError("a device is a name, or a number from 0 up")
        device = torch.device(f"{kind}:{int(given)}" if str(given).strip().isdecimal() else given)  # type: ignore[arg-type]  # a number is decimal
    except (RuntimeError, TypeError, ValueError) as exc:
        raise InputError(
            f'the device map has {given!r} for a device; it takes numbers of GPUs, names as "cuda:0", "cpu" and "disk"'
        ) from exc
    if device.type == "meta":
        raise InputError('the device map puts weights on "meta", where they have no values; "disk" lets them wait')
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def main_of(device_map: Mapping[str, Place], main_device: Place | None = None) -> str:
    """Return what runs what waits: the main device that is given, else the first GPU of the map, else the CPU."""
    names = [place_name(given) for given in ((main_device,) if main_device is not None else device_map.values())]
    main = next((name for name in names if name not in ("cpu", "disk")), "cpu")
    if main_device is not None and names == ["disk"]:
        raise InputError('the main device is "disk", and nothing can run there')
    return main


@dataclass(frozen=True, slots=True)
class _Unit:
    """A module that owns tensors, or that is one with all that is below it; tensors by their names in it."""

    path: str
    kind: str
    tensors: tuple[Tensor, ...]


def _read(device_map: Mapping[str, Place], main_device: Place | None) -> DeviceMap:
    if not device_map:
        raise InputError('the device map is empty; {"": 0} puts all on the first GPU')
    for name in device_map:
        if not isinstance(name, str):
            raise InputError(f"the device map names {name!r}; it takes the names of modules and tensors, as texts")
    entries = {name: place_name(given) for name, given in device_map.items()}
    return DeviceMap(entries=entries, main=main_of(device_map, main_device))


def _units(model: torch.nn.Module, whole: Collection[str]) -> Iterator[_Unit]:
    """Yield the modules that own tensors, in the order in which they are registered; what has no forward of its own
    owns none, where its parent has one.
    """
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        is_whole = type(module).__name__ in whole or isinstance(module, _UNCALLED)
        if is_whole:
            inside.update(map(id, module.modules()))
        tensors = tuple(_tensors(module, recurse=is_whole))
        for name, child in module.named_children() if not is_whole and _has_forward(module) else ():
            if id(child) not in inside and not any(map(_has_forward, child.modules())):
                # As a ParameterList: nothing can call it, and its parent computes with what it holds.
                inside.update(map(id, child.modules()))
                tensors += tuple(replace(held, name=f"{name}.{held.name}") for held in _tensors(child, recurse=True))
        if tensors:
            yield _Unit(path, type(module).__name__, tensors)


def _has_forward(module: torch.nn.Module) -> bool:
    return "forward" in vars(module) or type(module).forward is not torch.nn.Module.forward


def _tensors(module: torch.nn.Module, *, recurse: bool) -> Iterator[Tensor]:
    for name, parameter in module.named_parameters(recurse=recurse, remove_duplicate=False):
        if is_lazy(parameter):
            raise InputError(
                f"{name} of a {type(module).__name__} has no shape until its model is called: call it, then dispatch it"
            )
        yield _tensor(name, parameter)
    for name, buffer in module.named_buffers(recurse=recurse, remove_duplicate=False):
        owner, leaf = place.owner(module, name)
        yield replace(_tensor(name, buffer), buffer=True, persistent=leaf not in owner._non_persistent_buffers_set)


def _tensor(name: str, tensor: torch.Tensor) -> Tensor:
    return Tensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        nbytes=tensor.numel() * tensor.dtype.itemsize,
    )


def _graph(model: torch.nn.Module, units: Collection[_Unit], stays: Callable[[str, Tensor], bool]) -> LayerGraph:
    """Return units as layers, each of at most two groups; `stays`: which tensors, with their full names, never wait."""
    kinds: dict[LayerKind, int] = {}
    layers = []
    for unit in units:
        groups = [
            WeightGroup(name=name, slices=1, used_slices=1, streamable=name == _WEIGHTS, tensors=tensors)
            for name, wanted in ((_WEIGHTS, False), (_STAYING, True))
            if (
                tensors := tuple(
                    tensor for tensor in unit.tensors if stays(full_name(unit.path, tensor.name), tensor) == wanted
                )
            )
        ]
        kind = LayerKind(name=unit.kind, groups=tuple(groups))
        layers.append(Layer(name=unit.path, kind=kinds.setdefault(kind, len(kinds))))
    return LayerGraph(
        model=type(model).__name__,
        batch_size=1,
        kinds=tuple(kinds),
        layers=tuple(layers),
        edges=(),
        ties=_ties(model),
        loose=(),
        allocator_bytes=0,
        passes=(),
    )


def _ties(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the sets of names that stand for one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in place.named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(found) for found in names.values() if len(found) > 1)


def _staying(entry: Placement) -> Placement:
    return replace(entry, home=entry.run_on, memory="pageable" if entry.run_on == "cpu" else "device")


def _hardware(names: Collection[str]) -> Hardware:
    """Return devices of which nothing but the names is known."""
    gpus = sorted({name for name in names if name not in ("cpu", "disk")})
    devices = tuple(
        Device(
            name=name,
            kind="cpu" if name == "cpu" else "cuda",
            product="not looked at",
            pool=name,
            flops_per_s={"default": 1},
            bytes_per_s=1,
            operator_ns=0,
            context_bytes=0,
            workspace_bytes=0,
        )
        for name in (*gpus, "cpu")
    )
    pools = tuple(MemoryPool(name=name, capacity_bytes=0, reserved_bytes=0) for name in (*gpus, "cpu", "disk"))
    return Hardware(devices=devices, pools=pools, links=())
