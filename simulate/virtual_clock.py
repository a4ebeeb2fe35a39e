"""The time of a virtual machine: when each operator and copy would have begun and ended on the hardware it stands for.

Lanes are the host, each device's computing, and each link. The host issues operators one after another and runs
ahead; one starts when it was issued, its device is free, and what it reads has been written. The host waits where it
looks at numbers, and for copies that come to it. An operator takes the longer of its FLOPs at the device's matmul
rate and the bytes of its tensors at its memory rate; views take none, nor does asking for memory. A copy takes its
bytes and the latency of the link. Rates are those of `planner.hardware`; the formulas are this module's own. Nothing
that predicts is imported here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.hardware import Device, Hardware, Link

aten = torch.ops.aten

# Operators that read as much of their first tensor as they return.
_GATHERS = frozenset({aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default})
_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_MASKS = (torch.bool, torch.uint8)
_NS = 10**9


class Clock:
    """When lanes are free and storages are written and read, in ns since the machine was made."""

    def __init__(self, hardware: Hardware):
        self._hardware = hardware
        self._free: dict[str, int] = {}
        self._written: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._host = 0
        # Weights may be loaded by several threads.
        self._lock = threading.RLock()

    @property
    def ns(self) -> int:
        """The instant when everything that was issued is done."""
        with self._lock:
            return max([self._host, *self._free.values()])

    def synchronize(self) -> int:
        """Let the host wait until everything is done, and return that instant."""
        with self._lock:
            self._host = self.ns
            return self._host

    def operator(
        self, name: str, func: Any, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], call: Any
    ) -> None:
        """Note an operator on a device. call: its (args, kwargs, result)."""
        if not made and func is not aten._local_scalar_dense.default:
            return
        mutable = func._schema.is_mutable
        if made and not mutable and {_key(tensor) for tensor in made} <= {_key(tensor) for tensor in given}:
            return
        device = self._hardware.device(name)
        with self._lock:
            if made:
                took = work_ns(device, func, given, made, call)
                self._issue(device, took, reads=given, writes=made)
            if _looks(func, given):
                self._wait_for(given)

    def copy(self, source: str, target: str, given: torch.Tensor, made: torch.Tensor, nbytes: int) -> None:
        """Note a copy between two devices; the host waits for what comes to it."""
        host = self._hardware.host(source)
        with self._lock:
            self._host += self._hardware.device(source if target == host else target).operator_ns
            start = max(self._host, self._written.get(_key(given), 0))
            start = max(start, self._written.get(_key(made), 0), self._read.get(_key(made), 0))
            for link in self._way(source, target):
                lane = link.lane or f"{link.source}→{link.target}"
                start = max(start, self._free.get(lane, 0)) + link.latency_ns + nbytes * _NS // link.bytes_per_s
                self._free[lane] = start
            if target == host:
                self._host = start
            else:
                self._written[_key(made)] = start
            if source != host:
                self._read[_key(given)] = max(start, self._read.get(_key(given), 0))

    def wait_for(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the host wait until these are written."""
        with self._lock:
            self._wait_for(tensors)

    def forget(self, key: int) -> None:
        """Drop what is known of a storage that is gone."""
        with self._lock:
            self._written.pop(key, None)
            self._read.pop(key, None)

    def _issue(
        self, device: Device, took: int, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        if device.kind == "cpu":
            self._host += max(took, device.operator_ns)
            return
        self._host += device.operator_ns
        known = [self._written.get(_key(tensor), 0) for tensor in (*reads, *writes)]
        known += [self._read.get(_key(tensor), 0) for tensor in writes]
        end = max([self._host, self._free.get(device.name, 0), *known]) + took
        self._free[device.name] = end
        self._read.update((_key(tensor), end) for tensor in reads)
        self._written.update((_key(tensor), end) for tensor in writes)

    def _wait_for(self, tensors: Iterable[torch.Tensor]) -> None:
        self._host = max([self._host, *(self._written.get(_key(tensor), 0) for tensor in tensors)])

    def _way(self, source: str, target: str) -> tuple[Link, ...]:
        """Return the links of a copy: one, or two over the host where the devices are not joined."""
        try:
            return (self._hardware.link(source, target),)
        except KeyError:
            host = self._hardware.host(source)
            return self._hardware.link(source, host), self._hardware.link(host, target)


class HostOperators(TorchDispatchMode):
    """Tells the clock of operators between plain tensors of the CPU, while the block of its machine lasts."""

    def __init__(self, clock: Clock, name: str):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._clock, self._name = clock, name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = tensors_in((args, kwargs)), tensors_in(out)
        if (given or made) and all(_is_plain(tensor) for tensor in (*given, *made)):
            self._clock.operator(self._name, func, given, made, (args, kwargs, out))
        return out


def work_ns(device: Device, func: Any, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor], call: Any) -> int:
    """Return what an operator takes of a device, in ns: the longer of its arithmetic and its reading and writing."""
    dtype = next((tensor.dtype for tensor in given if tensor.dtype.is_floating_point), torch.float32)
    arithmetic = flops(func, call) * _NS // device.flops_for(str(dtype).removeprefix("torch."))
    written = sum(_nbytes(tensor) for tensor in made)
    read = written if func in _GATHERS else sum(_nbytes(tensor) for tensor in given)
    if func._schema.is_mutable and func not in _GATHERS:
        written = 0 if {_key(tensor) for tensor in made} <= {_key(tensor) for tensor in given} else written
    return max(arithmetic, (read + written) * _NS // device.bytes_per_s)


def flops(func: Any, call: Any) -> int:
    """Return an operator's FLOPs: by torch's formula, and of attention and products by groups, which it has none for,
    two for each multiply-add.
    """
    from torch.utils.flop_counter import flop_registry

    args, kwargs, out = call
    packet = func._overloadpacket
    if packet is aten._grouped_mm:
        return int(2 * out.numel() * args[0].size(-1))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = args[:3]
        return int(2 * query.shape[:-1].numel() * key.size(-2) * (query.size(-1) + value.size(-1)))
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors in nested values, in order."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _looks(func: Any, given: Sequence[torch.Tensor]) -> bool:
    """Tell whether the host must know an operator's result to go on."""
    if func is aten.index.Tensor:
        return any(tensor.dtype in _MASKS for tensor in given[1:])
    return any(tag in func.tags for tag in _LOOKS)


def _key(tensor: torch.Tensor) -> int:
    inner: torch.Tensor = getattr(tensor, "stand_in", tensor)
    return int(inner.untyped_storage()._cdata)


def _nbytes(tensor: torch.Tensor) -> int:
    inner: torch.Tensor = getattr(tensor, "stand_in", tensor)
    return min(inner.numel() * inner.element_size(), inner.untyped_storage().nbytes())


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
