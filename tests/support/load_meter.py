"""Measures what loading holds, in every thread and by the kernel's own count: nothing here imports what predicts."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveEverywhere:
    """Bytes by device of storages that operators of any thread made and that are alive; `peak` is the most of each.

    Dispatch modes belong to their thread, so that each new thread enters one of its own. Storages met for the first
    time as arguments, and mapped files, are not counted. The caller's own come with `given`.
    """

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._known: dict[int, int] = {}
        # A finaliser may run inside of `meet`, in the same thread.
        self._lock = threading.RLock()

    def given(self, model: torch.nn.Module) -> None:
        """Count the memory of a model that is loaded already."""
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                self.meet(tensor, counted=True)

    def meet(self, tensor: torch.Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            key = storage._cdata
            if key in self._known:
                return
            nbytes = self._known[key] = storage.nbytes() if counted else 0
            device = str(tensor.device)
            self.live[device] = self.live.get(device, 0) + nbytes
            self.peak[device] = max(self.peak.get(device, 0), self.live[device])
            weakref.finalize(storage, self._gone, key, device)

    def _gone(self, key: int, device: str) -> None:
        with self._lock:
            self.live[device] -= self._known.pop(key)


class _Mode(TorchDispatchMode):
    def __init__(self, counts: LiveEverywhere):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views and results of in-place operators share an argument's storage, which is known by then.
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self.counts.meet(value, counted=False)
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.counts.meet(value, counted=True)
        return out


@contextlib.contextmanager
def live_everywhere(model: torch.nn.Module | None = None) -> Iterator[LiveEverywhere]:
    """Follow every storage made in this thread and in those begun inside, and those of a loaded `model`."""
    counts = LiveEverywhere()
    if model is not None:
        counts.given(model)
    run = threading.Thread.run

    def counted_run(thread: threading.Thread) -> None:
        with _Mode(counts):
            run(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", counted_run)
        with _Mode(counts):
            yield counts


class ResidentPeak:
    """The kernel's count of this process: `bytes` is the most that was resident above the start, files not included
    unless they were touched through a mapping.
    """

    bytes = 0


@contextlib.contextmanager
def resident_peak() -> Iterator[ResidentPeak]:
    """Measure the high-water mark of resident memory, on Linux alone."""
    assert sys.platform == "linux"
    result = ResidentPeak()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is resident now
    before = _status_bytes("VmRSS")
    yield result
    result.bytes = _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)
