"""What the CPU computes with straight from mapped files, read into the page cache before it is needed.

Without this, every page that is not in the page cache is waited for when it is touched, one after another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dispatch import page_cache
from planner.errors import InputError
from planner.loading import kept_bytes
from planner.plan import Plan
from planner.steps import READ_AHEAD
from planner.units import MIB

_READERS = 2
_PIECE_BYTES = 32 * MIB


def room_bytes(plan: Plan) -> int | None:
    """Return what the page cache may take on this machine, in bytes: what is free now but for what calls still take.

    None where the machine does not say what is free.
    """
    from planner.local import free_ram

    free, _ = free_ram(Path("/"))
    if free is None or plan.prediction is None:
        return free
    kept = kept_bytes(plan)
    hosts = {plan.hardware.host(device) for device in plan.run_on()}
    calls = sum(max(0, plan.prediction.peak_bytes.get(host, 0) - kept.get(host, 0)) for host in hosts)
    return max(0, free - calls)


def lasting(sizes: Mapping[str, int], room: int | None) -> frozenset[str]:
    """Return the groups that stay in the page cache from pass to pass: all where `room` holds them.

    Else as many as leave room for one in use and READ_AHEAD more, spread evenly, so that the disk is busy throughout.
    The kernel alone would keep none: of what is read in a circle it evicts what is needed next.
    """
    total = sum(sizes.values())
    if room is None or total <= room:
        return frozenset(sizes)
    share = max(0, room - (READ_AHEAD + 1) * max(sizes.values()))
    kept, kept_bytes, seen_bytes = [], 0, 0
    for name, nbytes in sizes.items():
        seen_bytes += nbytes
        if (kept_bytes + nbytes) * total <= share * seen_bytes:
            kept.append(name)
            kept_bytes += nbytes
    return frozenset(kept)


class ReadAhead:
    """The mapped groups of one model, each brought by threads that live for one call.

    Groups are expected in the order given, then in that of the call before. One that comes out of turn is right as
    well: it is brought when its module asks for it. `begin`, `reach`, `leave` and `end` come from one thread at a time.
    """

    def __init__(self, groups: Mapping[str, Sequence[torch.Tensor]], room: int | None):
        """Take {group: its mapped tensors}; `room`: bytes that the page cache may take, None for any."""
        self.groups = tuple(groups)
        self._tensors = groups
        self.lasting = lasting({name: sum(t.nbytes for t in tensors) for name, tensors in groups.items()}, room)
        self._order = self.groups
        self._reached: list[str] = []
        self._pass: Bringing | None = None

    def begin(self) -> None:
        """Begin to bring what a call needs."""
        self.end()
        self._reached = []
        self._pass = Bringing({name: self._tensors[name] for name in self._order}, self.lasting)

    def reach(self, name: str) -> None:
        """Wait until a group is there.

        Raises:
            InputError: it cannot be read any more.
        """
        self._reached.append(name)
        if self._pass is not None and self._pass.expects(name):
            for passed in self._pass.reach(name):
                self.leave(passed)
        else:
            for address, nbytes in _pieces(self._tensors[name]):
                _bring(name, address, nbytes)

    def leave(self, name: str) -> None:
        """Say that a group was used: it goes, unless it is one of those that stay."""
        if name not in self.lasting:
            for tensor in self._tensors[name]:
                page_cache.let_go(tensor.data_ptr(), tensor.nbytes)

    def end(self) -> None:
        """Stop bringing; what the call left out is expected again only if it comes after what was reached last."""
        if self._pass is None:
            return
        for name in self._pass.stop():
            self.leave(name)
        self._pass = None
        if self._reached:
            last = self._order.index(self._reached[-1]) if self._reached[-1] in self._order else len(self._order)
            self._order = tuple(dict.fromkeys((*self._reached, *self._order[last + 1 :])))


class Bringing:
    """One call's reading: pieces in order, by threads that end when all are read or the call has ended."""

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[torch.Tensor]]) -> Bringing | None:
        """Begin to read groups that stay, in order; None where all are in the page cache, or nobody can tell."""
        if not page_cache.SUPPORTED or all(
            page_cache.present(tensor.data_ptr(), tensor.nbytes) for tensors in groups.values() for tensor in tensors
        ):
            return None
        return cls(groups, frozenset(groups))

    def __init__(self, groups: Mapping[str, Sequence[torch.Tensor]], lasting: frozenset[str]):
        self._lasting = lasting
        self._names = tuple(groups)
        self._index = {name: index for index, name in enumerate(self._names)}
        # How many groups that do not stay come up to each; with none before the first.
        self._passing = [0]
        for name in self._names:
            self._passing.append(self._passing[-1] + (name not in lasting))
        self._waiting = deque((i, *piece) for i, name in enumerate(self._names) for piece in _pieces(groups[name]))
        self._missing = [0] * len(self._names)
        for index, _, _ in self._waiting:
            self._missing[index] += 1
        self._failed: dict[int, BaseException] = {}
        self._at = -1
        self._begun = -1
        self._ended = False
        self._changed = threading.Condition()
        for _ in range(_READERS):
            threading.Thread(target=self._read, name="loadplan read-ahead", daemon=True).start()

    def expects(self, name: str) -> bool:
        """Tell whether a group is yet to come."""
        return self._index.get(name, -1) > self._at

    def reach(self, name: str) -> tuple[str, ...]:
        """Wait until a group is there; return those that were to come before it and were left out."""
        index, before = self._index[name], self._at
        with self._changed:
            self._at = index
            while self._waiting and self._waiting[0][0] < index:
                self._missing[self._waiting.popleft()[0]] -= 1
            self._changed.notify_all()
            while self._missing[index]:
                self._changed.wait()
        if index in self._failed:
            raise self._failed[index]
        return self._names[before + 1 : index]

    def stop(self) -> tuple[str, ...]:
        """End the reading; return the groups that were begun and never reached."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
            return self._names[self._at + 1 : self._begun + 1]

    def _read(self) -> None:
        while True:
            with self._changed:
                while self._waiting and not self._may_begin(self._waiting[0][0]):
                    self._changed.wait()
                if not self._waiting:
                    return
                index, address, nbytes = self._waiting.popleft()
                self._begun = index
            failure = None
            try:
                _bring(self._names[index], address, nbytes)
            except BaseException as exc:  # for the caller's thread, which waits for it
                failure = exc
            with self._changed:
                if (self._ended or index < self._at) and self._names[index] not in self._lasting:
                    page_cache.let_go(address, nbytes)  # whoever was to let it go has been here
                self._missing[index] -= 1
                if failure is not None:
                    self._failed[index] = failure
                self._changed.notify_all()

    def _may_begin(self, index: int) -> bool:
        ahead = self._passing[index + 1] - self._passing[self._at + 1]
        return self._names[index] in self._lasting or ahead <= READ_AHEAD


def _pieces(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return (address, bytes) of all that the tensors take, those on one page or on neighbouring ones together, in
    pieces of at most _PIECE_BYTES.
    """
    spans: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        start, length = page_cache.pages(tensor.data_ptr(), tensor.nbytes)
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], start + length)
        else:
            spans.append((start, start + length))
    return [(at, min(_PIECE_BYTES, end - at)) for start, end in spans for at in range(start, end, _PIECE_BYTES)]


def _bring(name: str, address: int, nbytes: int) -> None:
    try:
        if not page_cache.present(address, nbytes):
            page_cache.bring(address, nbytes)
    except OSError as exc:
        raise InputError(
            f"{name} can no longer be read from the checkpoint's file, which was truncated or whose disk failed "
            f"({exc.strerror}); restore the file and load again"
        ) from exc
