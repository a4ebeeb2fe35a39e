"""Measures what the CPU's allocator hands out while operators run: the profiler's [memory] events, in order.

Nothing here imports what predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MARK = "@operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One operator that ran: what it was, what the caller of `operators_of` noted, and what the allocator saw.

    events: bytes taken (> 0) and given back (< 0) while it ran, in order.
    made: bytes of each storage that it returned and was not given, in order of return.
    """

    name: str
    note: Any
    events: tuple[int, ...]
    made: tuple[int, ...]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def events_of(call: Callable[[], Any], *, warm: bool = True) -> tuple[int, ...]:
    """Return the allocator's events, signed bytes in order, between the start and the end of `call`.

    What `call` returns is still alive at the end, so that its tensors are taken and not given back.
    warm: run it once before, so that what a library takes once and keeps is not counted.
    """
    if warm:
        call()
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with torch.no_grad(), profiling as profiler, _RecordFunctionFast(_MARK):
        kept = call()
    marks, events = _timeline(profiler)
    del kept
    (begin, end), *_ = marks
    return tuple(nbytes for when, nbytes in events if begin <= when <= end)


def peak_of(events: Iterable[int]) -> int:
    """Return the most bytes held above the start at any moment of `events`."""
    held = most = 0
    for nbytes in events:
        held += nbytes
        most = max(most, held)
    return most


def operators_of(call: Callable[[], Any], note: Callable[[Any, Any, Any, Any], Any]) -> list[Ran]:
    """Return every operator that `call` runs, as a dispatch mode sees them, with the events of each.

    note: called with (operator, args, kwargs, output tensors) before the next operator runs; its value is kept.
    """
    mode = _Marking(note)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, mode:
        call()
    marks, events = _timeline(profiler)
    assert len(marks) == len(mode.seen), (len(marks), len(mode.seen))
    ran = []
    at = 0
    for (begin, end), (name, value, made) in zip(marks, mode.seen, strict=True):
        while at < len(events) and events[at][0] < begin:
            at += 1
        first = at
        while at < len(events) and events[at][0] <= end:
            at += 1
        ran.append(Ran(name=name, note=value, events=tuple(n for _, n in events[first:at]), made=made))
    return ran


def _timeline(profiler: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    marks, events = [], []
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if name == _MARK:
            marks.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        elif name == "[memory]":
            events.append((event.start_ns(), event.nbytes()))
    marks.sort()
    # Stable: events of one nanosecond stay in the order in which the profiler holds them.
    events.sort(key=lambda event: event[0])
    return marks, events


class _Marking(TorchDispatchMode):
    def __init__(self, note: Callable[[Any, Any, Any, Any], Any]):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.note = note
        self.seen: list[tuple[str, Any, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        with _RecordFunctionFast(_MARK):
            out = func(*args, **kwargs)
        made = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in _tensors(out)
            if tensor.untyped_storage()._cdata not in given
        }
        note = self.note(func, args, kwargs, _tensors(out))
        self.seen.append((str(func), note, tuple(made.values())))
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
