"""Measures what a real run holds, by means of its own: nothing here imports what predicts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive; `peak_bytes` is the most of them."""

    def __init__(self, given: Iterable[torch.Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        # Bytes of storages as they come (> 0) and go (< 0).
        self.events: list[int] = []
        # Storage address → bytes counted. An address is used again after its storage is gone, so it is forgotten then.
        self._known: dict[int, int] = {}
        for tensor in given:
            self._meet(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._meet_all(args, counted=False)
        if kwargs:
            self._meet_all(kwargs.values(), counted=False)
        self._meet_all((out,), counted=True)
        return out

    def _meet_all(self, values: Iterable[Any], *, counted: bool) -> None:
        """Meet the tensors among what operators take and return, in lists and tuples too."""
        for value in values:
            if isinstance(value, torch.Tensor):
                self._meet(value, counted=counted)
            elif isinstance(value, (list, tuple)):
                self._meet_all(value, counted=counted)

    def _meet(self, tensor: torch.Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if counted else 0
        self._change(self._known[key])
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._change(-self._known.pop(key))

    def _change(self, nbytes: int) -> None:
        self.live_bytes += nbytes
        if nbytes:
            self.events.append(nbytes)


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def live_peak(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Return the most bytes alive in storages that operators made during `call`."""
    tracker = LiveStorages(tensors_of(model))
    with tracker, torch.no_grad():
        call()
    return tracker.peak_bytes


@dataclass(frozen=True, slots=True)
class LiveSpan:
    """From the start of one layer to the start of the next: bytes alive at its start, and the most until its end.

    events: bytes of storages as they come (> 0) and go (< 0), in order.
    """

    layer: str
    held_bytes: int
    most_bytes: int
    events: tuple[int, ...]


class _Spans:
    """Cuts a run into forward calls, and these into layers; what comes before a call's first layer belongs to it."""

    def __init__(self, tracker: LiveStorages):
        self.passes: list[list[LiveSpan]] = [[]]
        self._tracker = tracker
        self._layer: str | None = None
        self._held = self._calls = self._depth = 0

    def close(self, layer: str | None = None) -> None:
        if self._layer is not None:
            events = tuple(self._tracker.events)
            self.passes[-1].append(LiveSpan(self._layer, self._held, self._tracker.peak_bytes, events))
        self._layer, self._held = layer, self._tracker.live_bytes
        self._tracker.events.clear()
        self._tracker.peak_bytes = self._held

    def call(self) -> None:
        self._calls += 1
        if self._calls > 1:
            self.close()
            self.passes.append([])

    def enter(self, layer: str) -> None:
        if self._layer is None:
            self._layer = layer
        elif self._depth == 0 or layer != self._layer:
            self.close(layer)
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1


def live_passes(model: torch.nn.Module, layers: Iterable[str], call: Callable[[], Any]) -> list[list[LiveSpan]]:
    """Return what is alive in storages that operators made, for each forward call of `model`, layer by layer.

    layers: paths of modules, none inside another; a module with several paths goes by the first. A forward call lasts
    until the next one, so that the caller's code after it is part of its last layer.
    """
    tracker = LiveStorages(tensors_of(model))
    spans = _Spans(tracker)
    hooks = [model.register_forward_pre_hook(lambda *_: spans.call())]
    paths = {model.get_submodule(path): path for path in reversed(list(layers))}
    for module, path in paths.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: spans.enter(path)))
        hooks.append(module.register_forward_hook(lambda *_: spans.leave(), always_call=True))
    try:
        with tracker, torch.no_grad():
            call()
        spans.close()
    finally:
        for hook in hooks:
            hook.remove()
    return spans.passes


def allocator_peak(call: Callable[[], Any]) -> int:
    """Return the most bytes that the CPU's allocator held above its start, scratch of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        call()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    # Stable: events of one nanosecond stay in the order in which the profiler holds them.
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += int(event.nbytes())
        peak = max(peak, held)
    return peak


def weight_storage_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the distinct storages behind parameters and buffers."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_of(model)}.values())
