"""A machine of virtual accelerators: what each holds, what is copied between them, and the rules of tensors without
numbers. What PyTorch sees of it is in `simulate.virtual_device`. Nothing that predicts is imported here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

from planner.errors import InputError
from planner.hardware import Hardware
from simulate.virtual_clock import Clock, HostOperators

DEVICE_TYPE = "virtual"
aten = torch.ops.aten

# Operators that return (values, places), and which argument is the dimension.
_RANKINGS = {aten.topk.default: 2, aten.sort.default: 1}


class Pool:
    """The memory of one virtual device, in bytes of storages: each from its first tensor to its last."""

    def __init__(self, name: str, capacity_bytes: int, freed: Callable[[int], None] | None = None):
        self.name, self.capacity_bytes, self._freed = name, capacity_bytes, freed
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}
        # A storage may be freed while another is counted, in the same thread too.
        self._lock = threading.RLock()

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, or what it has grown by, until it is freed.

        Raises:
            torch.OutOfMemoryError: there is not so much left.
        """
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        with self._lock:
            before = self._known.get(key)
            self._take(nbytes - (before or 0))
            self._known[key] = nbytes
        if before is None:
            weakref.finalize(storage, self._forget, key)

    def reset_peak(self) -> None:
        """Let the peak begin again at what is held now."""
        self.peak_bytes = self.live_bytes

    def _take(self, nbytes: int) -> None:
        if nbytes > 0 and self.live_bytes + nbytes > self.capacity_bytes:
            raise torch.OutOfMemoryError(
                f"{self.name} is out of memory: it has {self.capacity_bytes:,} bytes, {self.live_bytes:,} are in use, "
                f"and {nbytes:,} more are asked for"
            )
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        with self._lock:
            self.live_bytes -= self._known.pop(key)
        if self._freed is not None:
            self._freed(key)


class Machine:
    """Virtual devices, in use while the `with` block of their machine lasts: one at a time in a process.

    devices: what PyTorch calls each, by the name that plans have for it. copied_bytes: by (from, to), as plans name
    them. numbers: whether tensors have any; without, floats and bytes are on meta, and whole numbers that come of them
    are zeros, or the first places of a ranking. hardware: what its clock goes by; without, it has none.
    """

    def __init__(self, capacities: Mapping[str, int], *, numbers: bool = True, hardware: Hardware | None = None):
        self.clock = None if hardware is None else Clock(hardware)
        self._host_operators = None if self.clock is None else HostOperators(self.clock, "cpu")
        freed = None if self.clock is None else self.clock.forget
        self._pools = [Pool(name, nbytes, freed) for name, nbytes in capacities.items()]
        self.devices = {name: torch.device(DEVICE_TYPE, index) for index, name in enumerate(capacities)}
        self.numbers = numbers
        self.copied_bytes: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Machine:
        global _active
        if _active is not None:
            raise InputError("another virtual machine is in use: leave its block first")
        _active = self
        if self._host_operators is not None:
            self._host_operators.__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active = None
        if self._host_operators is not None:
            self._host_operators.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's own

    @property
    def clock_ns(self) -> int:
        """The instant when all that was begun in the machine's block is done, in ns of its hardware's time."""
        return self._clock().ns

    def synchronize(self) -> int:
        """Let the host wait until all is done, and return that instant, in ns."""
        return self._clock().synchronize()

    def peak_bytes(self, name: str) -> int:
        """Return the most bytes that were in use on a device at once, since the start or the last reset."""
        return self._named(name).peak_bytes

    def live_bytes(self, name: str) -> int:
        """Return the bytes in use on a device now."""
        return self._named(name).live_bytes

    def reset_peaks(self) -> None:
        """Let the peak of every device begin again at what is in use now."""
        for pool in self._pools:
            pool.reset_peak()

    def inputs(self, value: Any, name: str | None = None) -> Any:
        """Return tensors, also in lists, tuples and dicts, on a device of the machine: the first unless named; "cpu"
        leaves them there.

        Raises:
            InputError: there is no such device.
        """
        if name == "cpu":
            return value
        name = next(iter(self.devices)) if name is None else self._named(name).name
        device = self.devices[name]
        return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, value)

    def blank(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give a model on meta weights in host memory that take no memory and have no numbers, and return it."""
        from simulate.virtual_device import VirtualTensor

        made: dict[int, Any] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        wrapped: Any = VirtualTensor(tensor.detach(), torch.device("cpu"))
                        if isinstance(tensor, torch.nn.Parameter):
                            wrapped = torch.nn.Parameter(wrapped, requires_grad=False)
                        made[id(tensor)] = wrapped
                    held[name] = made[id(tensor)]
        return model

    # What the device's tensors ask of their machine.
    def pool(self, device: torch.device) -> Pool:
        index = device.index or 0
        if index >= len(self._pools):
            raise RuntimeError(f"there is no {device}: this machine has {len(self._pools)} virtual devices")
        return self._pools[index]

    def name(self, device: torch.device) -> str:
        """Return what plans call a device."""
        return self.pool(device).name if device.type == DEVICE_TYPE else str(device)

    def copied(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Note a copy from one device to another."""
        if source.device != target.device and "meta" not in (source.device.type, target.device.type):
            way = (self.name(source.device), self.name(target.device))
            nbytes = target.numel() * target.element_size()
            self.copied_bytes[way] = self.copied_bytes.get(way, 0) + nbytes
            if self.clock is not None:
                self.clock.copy(*way, source, target, nbytes)

    def is_blank(self, dtype: torch.dtype) -> bool:
        """Tell whether tensors of a dtype have no numbers here: floats, and bytes that stand for them."""
        return not self.numbers and (dtype.is_floating_point or dtype == torch.uint8)

    def placed(self, inner: torch.Tensor) -> torch.Tensor:
        """Return what stands for a new tensor here."""
        return _on_meta(inner) if self.is_blank(inner.dtype) and not inner.is_meta else inner

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on what stands for its tensors."""
        if func is aten.histc.default and not args[0].is_floating_point():
            # As on a GPU, which has it for whole numbers too.
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        if self.numbers:
            return func(*args, **kwargs)
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if any(value.is_meta for value in given):
            return self._without_numbers(func, args, kwargs, given)
        out = func(*args, **kwargs)
        return tree_map(lambda value: self.placed(value) if isinstance(value, torch.Tensor) else value, out)

    def fill(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy numbers, where there are any."""
        if source.is_meta:
            if not target.is_meta and not self.is_blank(target.dtype):
                target.zero_()
        elif not target.is_meta:
            target.copy_(source)

    def _without_numbers(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], _places(args[1]), *args[2:])
        originals: dict[int, torch.Tensor] = {}

        def on_meta(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.is_meta:
                return value
            made = _on_meta(value)
            originals[id(made)] = value
            return made

        meta_args, meta_kwargs = tree_map(on_meta, (args, kwargs))

        def real(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in originals:
                return originals[id(value)]
            if self.is_blank(value.dtype) or any(value is other for other in given):
                return value
            return torch.zeros(value.shape, dtype=value.dtype)

        out = tree_map(real, func(*meta_args, **meta_kwargs))
        if func in _RANKINGS:
            # Whatever the values, their places differ.
            places, at = out[1], _RANKINGS[func]
            dim = args[at] if len(args) > at else -1
            shape = [1] * places.dim()
            shape[dim] = places.size(dim)
            places.copy_(torch.arange(places.size(dim)).view(shape).expand_as(places))
        return out

    def _clock(self) -> Clock:
        if self.clock is None:
            raise InputError("this machine has no clock: make it of a Hardware, or by simulate.virtual")
        return self.clock

    def _named(self, name: str) -> Pool:
        found = next((pool for pool in self._pools if pool.name == name), None)
        if found is None:
            raise InputError(f"there is no virtual device {name!r}; this machine has {', '.join(self.devices)}")
        return found


_active: Machine | None = None


def active() -> Machine:
    """Return the machine in use.

    Raises:
        RuntimeError: there is none.
    """
    if _active is None:
        raise RuntimeError("a tensor of a virtual device was used outside the `with` block of its machine")
    return _active


def is_active() -> bool:
    """Tell whether a machine is in use."""
    return _active is not None


def virtual(machine: str | int | Hardware, *, numbers: bool = True) -> Machine:
    """Return virtual GPUs, "2x24GB" or those of a Hardware: devices that PyTorch code can use on any machine.

    Their capacity is what tensors may take: what the hardware has, less its context and workspace. Without `numbers`
    models of any size run, and compute nothing.

    Raises:
        InputError: there is no GPU in it, or one without room for tensors; or this process has a backend of its own.
    """
    from simulate.virtual_device import set_up

    hardware = machine if isinstance(machine, Hardware) else Hardware.from_options(machine)
    capacities = {
        device.name: hardware.pool(device.pool).usable_bytes - device.context_bytes - device.workspace_bytes
        for device in hardware.gpus
    }
    if not capacities:
        raise InputError("a virtual machine needs at least one GPU, such as virtual('2x24GB')")
    for device in hardware.gpus:
        if capacities[device.name] <= 0:
            taken, usable = device.context_bytes + device.workspace_bytes, hardware.pool(device.pool).usable_bytes
            raise InputError(
                f"{device.name} has {usable:,} bytes, and its context and workspace take {taken:,}: "
                "nothing is left for tensors; take a larger one"
            )
    set_up()
    return Machine(capacities, numbers=numbers, hardware=hardware)


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _places(indices: Any) -> list[Any]:
    """Return indices with truths as the places where they hold."""
    found: list[Any] = []
    for index in indices:
        found += list(index.nonzero(as_tuple=True)) if index is not None and index.dtype == torch.bool else [index]
    return found
