"""What a run really took, to be held beside what the plan said. Nothing that predicts is imported here."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured call.

    operator_outputs: per device ("cpu", "cuda:0"), the most bytes alive at once in tensors that operators made.
    reserved: per CUDA device, the most bytes that the caching allocator had taken from the driver.
    wall_ns: of the whole call, slowed by the measuring.
    """

    operator_outputs: dict[str, int]
    reserved: dict[str, int]
    wall_ns: int


def measure(call: Callable[[], Any]) -> tuple[Any, Measurement]:
    """Run `call` once and return its result and what it took.

    Every storage that an operator returns and that none took is followed until it is freed. Scratch that kernels take
    and give back inside one operator is not seen.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    for index in gpus:
        torch.cuda.reset_peak_memory_stats(index)
    meter = _StorageMeter()
    started = time.perf_counter_ns()
    with meter:
        result = call()
    for index in gpus:
        torch.cuda.synchronize(index)
    wall = time.perf_counter_ns() - started
    reserved = {f"cuda:{index}": int(torch.cuda.max_memory_reserved(index)) for index in gpus}
    return result, Measurement(operator_outputs=dict(meter.peak), reserved=reserved, wall_ns=wall)


class _StorageMeter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self._meet(value, 0)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._meet(value, value.untyped_storage().nbytes())
        return out

    def _meet(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        device = str(tensor.device)
        self._known[key] = nbytes
        weakref.finalize(storage, self._forget, key, device)
        if nbytes:
            self.live[device] = self.live.get(device, 0) + nbytes
            self.peak[device] = max(self.peak.get(device, 0), self.live[device])

    def _forget(self, key: int, device: str) -> None:
        nbytes = self._known.pop(key)
        if nbytes:
            self.live[device] -= nbytes
