"""Measures what a real run holds, by means of its own: nothing here imports what predicts."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive; `peak_bytes` is the most of them."""

    def __init__(self, given: Iterable[torch.Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        # Storage address → bytes counted. An address is used again after its storage is gone, so it is forgotten then.
        self._known: dict[int, int] = {}
        for tensor in given:
            self._meet(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self._meet(value, counted=False)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._meet(value, counted=True)
        return out

    def _meet(self, tensor: torch.Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        self.live_bytes += self._known[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def live_peak(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Return the most bytes alive in storages that operators made during `call`."""
    tracker = LiveStorages(tensors_of(model))
    with tracker, torch.no_grad():
        call()
    return tracker.peak_bytes


def allocator_peak(call: Callable[[], Any], trace: Path) -> int:
    """Return the most bytes that the CPU's allocator held above its start, scratch of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        call()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))
    held = peak = 0
    for event in events:
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


def weight_storage_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the distinct storages behind parameters and buffers."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}.values())
