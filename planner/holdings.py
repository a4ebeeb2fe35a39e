"""Whose tensors are held while a pass runs, so that each can be counted on the device that it is on.

A tensor is where the layer that made it runs. The caller's are where the first layer does. What a layer is handed from
another device is copied to its own once in a call, and the copy lives as long as what it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Bytes that are held of what one layer made. back: so many layers before the one that runs; None: the caller's.

    Of a cache, what it has grown by since the layer that runs began.
    """

    back: int | None
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A tensor that `maker` made and only `taker` is handed, each so many layers back (None: the caller)."""

    maker: int | None
    taker: int | None
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is held at one instant: shares by maker, what one layer was handed, and which of the pass's `lasting`."""

    shares: tuple[Share, ...]
    handed: tuple[Handed, ...]
    lasting: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The instants of layer `layer`, and of `count` neighbours alike, at which most is held: for any placement, the
    peak of each device while the layer runs is at one of them.
    """

    layer: int
    count: int
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Takers:
    """Layers `first`, `first + step` and so on, `count` of them."""

    first: int
    count: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """A tensor that several layers are handed in one pass; maker: the layer that made it, None: the caller."""

    maker: int | None
    nbytes: int
    takers: tuple[Takers, ...]


def most_held(
    holdings: Sequence[Holding],
    lasting: Sequence[Lasting],
    devices: Sequence[str],
    cached: Sequence[tuple[int, int]],
) -> dict[str, int]:
    """Return per device the most bytes held in one pass, where layer i runs on `devices[i]`.

    cached: of each layer's cache, the bytes before and after it ran.
    """
    caches = dict.fromkeys(devices, 0)
    for device, (before, _) in zip(devices, cached, strict=True):
        caches[device] += before
    best = dict(caches)
    grown: set[int] = set()
    for holding in holdings:
        for layer in range(holding.layer, holding.layer + holding.count):
            for moment in holding.moments:
                for device, nbytes in _held(moment, layer, lasting, devices).items():
                    best[device] = max(best[device], caches[device] + nbytes)
            if layer not in grown:
                grown.add(layer)
                before, after = cached[layer]
                caches[devices[layer]] += after - before
    return best


def problem(holdings: Sequence[Holding], lasting: Sequence[Lasting], layers: int) -> str | None:
    """Return in words what cannot be of holdings in a graph of so many layers, or None."""
    for holding in holdings:
        first, last = holding.layer, holding.layer + holding.count - 1
        if not 0 <= first <= last < layers:
            return f"holdings name layers {first} to {last} of {layers}"
        for moment in holding.moments:
            backs = [share.back for share in moment.shares]
            backs += [back for entry in moment.handed for back in (entry.maker, entry.taker)]
            known = [back for back in backs if back is not None]
            if any(not 0 <= layer - back < layers for layer in (first, last) for back in known):
                return f"holdings of layer {first} name a layer that is not there"
            if not set(moment.lasting) <= set(range(len(lasting))):
                return f"holdings of layer {first} name a tensor that is not among `lasting`"
    for tensor in lasting:
        named = [tensor.maker or 0]
        for row in tensor.takers:
            if row.count < 1 or row.step < 1:
                return "takers of a tensor among `lasting` go nowhere"
            named += [row.first, row.first + (row.count - 1) * row.step]
        if not set(named) <= set(range(layers)):
            return "a tensor among `lasting` names a layer that is not there"
    return None


def _held(moment: Moment, layer: int, lasting: Sequence[Lasting], devices: Sequence[str]) -> Mapping[str, int]:
    def place(back: int | None) -> str:
        return devices[0 if back is None else layer - back]

    held = dict.fromkeys(devices, 0)
    for share in moment.shares:
        held[place(share.back)] += share.nbytes
    for entry in moment.handed:
        if place(entry.taker) != place(entry.maker):
            held[place(entry.taker)] += entry.nbytes
    for index in moment.lasting:
        tensor = lasting[index]
        takers = (
            taker
            for row in tensor.takers
            for taker in range(row.first, row.first + row.count * row.step, row.step)
            if taker <= layer
        )
        for device in {devices[taker] for taker in takers} - {devices[tensor.maker or 0]}:
            held[device] += tensor.nbytes
    return held
