"""Who made what is held while a model is traced, and which layers are handed it: read into `planner.holdings`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.holdings import Handed, Holding, Lasting, Moment, Share, Takers
from planner.lifetimes import Event

if TYPE_CHECKING:
    import torch

    from planner.recorder import RawSpan

# The maker of what no layer made.
CALLER = None


@dataclass(slots=True)
class Taken:
    """A tensor that layers were handed: its maker, its bytes, (event, taker) for each, and when it was gone."""

    maker: int | None
    nbytes: int
    takes: list[tuple[int, int | None]] = field(default_factory=list)
    gone: int | None = None

    def within(self, start: int, end: int) -> Taken:
        """Return what events [start, end) see of it, counted from their start."""
        takes = [(at - start, taker) for at, taker in self.takes if start <= at < end]
        gone = None if self.gone is None or self.gone >= end else self.gone - start
        return Taken(self.maker, self.nbytes, takes, gone)


class Journal:
    """Kept beside a stream of events. makers: of each block that tensors were seen in."""

    def __init__(self, events: list[Event]):
        self.makers: dict[int, int | None] = {}
        self.taken: list[Taken] = []
        self._events = events
        self._open: dict[int, Taken] = {}

    def take(self, tensor: torch.Tensor, maker: int | None, taker: int | None) -> None:
        """Note that a layer is handed a tensor; of one tensor object, a device has one copy."""
        entry = self._open.get(id(tensor))
        if entry is None:
            entry = Taken(maker, tensor.numel() * tensor.element_size())
            self._open[id(tensor)] = entry
            self.taken.append(entry)
            weakref.finalize(tensor, self._gone, id(tensor), entry)
        entry.takes.append((len(self._events), taker))

    def borrow(self, tensor: torch.Tensor, maker: int | None, taker: int | None) -> Taken:
        """Note that one operator is handed a tensor, until `give_back`."""
        entry = Taken(maker, tensor.numel() * tensor.element_size(), [(len(self._events), taker)])
        self.taken.append(entry)
        return entry

    def give_back(self, entry: Taken) -> None:
        entry.gone = len(self._events)

    def end_call(self) -> None:
        """Note that a call of the model is over: no copy outlives it."""
        for key in list(self._open):
            self._gone(key, self._open[key])

    def _gone(self, key: int, entry: Taken) -> None:
        if self._open.get(key) is entry:
            del self._open[key]
            entry.gone = len(self._events)


def holdings_of(
    *,
    events: Sequence[Event],
    spans: Sequence[RawSpan],
    held: Mapping[int | None, int],
    taken: Sequence[Taken],
    makers: Mapping[int, int | None],
    cache_blocks: AbstractSet[int],
    position: Mapping[int, int],
) -> tuple[tuple[Holding, ...], tuple[Lasting, ...]]:
    """Return what is held in a pass, by who made it.

    held: bytes when it starts, by maker, the cache apart. position: of each layer in the graph; what the first one
    makes is where the caller's is.
    """
    placed: dict[int | None, int | None] = {CALLER: CALLER, **{layer: at or CALLER for layer, at in position.items()}}
    taken = [_placed(entry, placed) for entry in taken]
    taken = [entry for entry in taken if any(taker != entry.maker for _, taker in entry.takes)]
    lasting = [entry for entry in taken if _outlasts(entry, spans)]
    numbers = {id(entry): number for number, entry in enumerate(lasting)}
    changes: dict[int, list[tuple[Taken, bool]]] = {}
    for entry in taken:
        if entry.takes and entry.gone != entry.takes[0][0]:
            changes.setdefault(entry.takes[0][0], []).append((entry, True))
            if entry.gone is not None:
                changes.setdefault(entry.gone, []).append((entry, False))
    now: dict[int | None, int] = {}
    for layer, nbytes in held.items():
        now[placed[layer]] = now.get(placed[layer], 0) + nbytes
    alive: dict[int, Taken] = {}
    found: list[Holding] = []
    for span in spans:
        at_layer = position[max(span.layer, 0)]
        moments = _Moments(at_layer, numbers)
        growth: dict[int | None, int] = {}
        for at in range(span.start, span.end + 1):
            if at > span.start:
                moments.note(now, growth, alive)
            # What happens between two spans belongs to the one before it, but for what the next layer is handed.
            for entry, begins in changes.get(at, ()):
                if begins and (at == span.start or at < span.end or span is spans[-1]):
                    alive[id(entry)] = entry
                elif not begins and (at > span.start or span is spans[0]):
                    alive.pop(id(entry), None)
            moments.note(now, growth, alive)
            if at == span.end:
                break
            event = events[at]
            maker = placed[makers.get(event.block, CALLER)]
            if event.block in cache_blocks:
                growth[maker] = growth.get(maker, 0) + event.nbytes
            elif event.kind != "library" and event.block in makers:
                now[maker] = now.get(maker, 0) + event.nbytes
        here = moments.most()
        last = found[-1] if found else None
        if last is not None and last.layer + last.count == at_layer and last.moments == here:
            found[-1] = Holding(layer=last.layer, count=last.count + 1, moments=here)
        else:
            found.append(Holding(layer=at_layer, count=1, moments=here))
    return tuple(found), tuple(_lasting(entry) for entry in lasting)


class _Moments:
    """Collects the instants of one span, and keeps those at which no other holds as much of everything."""

    def __init__(self, layer: int, lasting: Mapping[int, int]):
        self._layer, self._lasting = layer, lasting
        self._kept: list[tuple[dict[int | None, int], frozenset[int], tuple[Taken, ...]]] = []

    def note(self, now: Mapping[int | None, int], growth: Mapping[int | None, int], alive: Mapping[int, Taken]) -> None:
        held = {maker: now.get(maker, 0) + growth.get(maker, 0) for maker in {*now, *growth}}
        keys = frozenset(alive)
        if any(_covers(other, held) and keys <= known for other, known, _ in self._kept):
            return
        self._kept = [each for each in self._kept if not (_covers(held, each[0]) and each[1] <= keys)]
        self._kept.append((held, keys, tuple(alive.values())))

    def most(self) -> tuple[Moment, ...]:
        return tuple(
            Moment(
                shares=tuple(
                    Share(back=self._back(maker), nbytes=nbytes)
                    for maker, nbytes in sorted(held.items(), key=lambda item: _rank(item[0]))
                    if nbytes
                ),
                handed=tuple(
                    Handed(maker=self._back(entry.maker), taker=self._back(entry.takes[0][1]), nbytes=entry.nbytes)
                    for entry in alive
                    if id(entry) not in self._lasting
                ),
                lasting=tuple(sorted(self._lasting[id(entry)] for entry in alive if id(entry) in self._lasting)),
            )
            for held, _, alive in self._kept
        )

    def _back(self, layer: int | None) -> int | None:
        return None if layer is None else self._layer - layer


def _covers(one: Mapping[int | None, int], other: Mapping[int | None, int]) -> bool:
    return all(one.get(maker, 0) >= other.get(maker, 0) for maker in {*one, *other})


def _rank(layer: int | None) -> int:
    return -1 if layer is None else layer


def _placed(entry: Taken, placed: Mapping[int | None, int | None]) -> Taken:
    return Taken(placed[entry.maker], entry.nbytes, [(at, placed[taker]) for at, taker in entry.takes], entry.gone)


def _outlasts(entry: Taken, spans: Sequence[RawSpan]) -> bool:
    """Tell whether several layers are handed a tensor, or one that ends before the tensor does."""
    first = entry.takes[0][0]
    ends = next((span.end for span in spans if span.start <= first < span.end), first)
    return len({taker for _, taker in entry.takes}) > 1 or entry.gone is None or entry.gone > ends


def _lasting(entry: Taken) -> Lasting:
    takers = sorted({taker or 0 for _, taker in entry.takes})
    rows: list[Takers] = []
    while takers:
        step = takers[1] - takers[0] if len(takers) > 1 else 1
        count = next((n for n, taker in enumerate(takers) if taker != takers[0] + n * step), len(takers))
        rows.append(Takers(first=takers[0], count=count, step=step))
        takers = takers[count:]
    return Lasting(maker=entry.maker, nbytes=entry.nbytes, takers=tuple(rows))
