"""Keys and values that wait in host memory: what transformers' offloaded cache holds where, and what it copies.

Read from transformers' `cache_utils.Cache.update` and `CacheLayerMixin`, and torch's `_to_copy` and pinned allocator:

- When a layer adds to its cache, the next one's keys and values (of the last layer: the first one's) begin their way
  up, so that two layers' are on the device at once; between layers it is the next one's alone.
- As soon as they are added to, a layer's whole keys and values are copied down on the stream that computes, which waits
  for it. The copy up is on a stream of its own, which is one of the first GPU: on others it waits in turn as well.
- What is copied down lies in pinned memory, in blocks rounded up to powers of two, which are kept for the next of that
  size and never given back: of a cache that grew, one block of each power that it went through.

A graph is made from one traced with a cache that stays. Keys and values are taken to be equally large, and to leave the
device when their layer ends (in truth, when its attention does).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from planner.graph import LayerGraph, Pass, Span
from planner.hardware import Hardware

# Keys, and values.
_TENSORS = 2


def on_host(graph: LayerGraph) -> LayerGraph:
    """Return a graph, traced with its cache on the device, with its cache in host memory."""
    if not graph.passes:
        return graph
    first = graph.passes[0].per_layer()
    passes = tuple(_moved(entry, first, is_first=number == 0) for number, entry in enumerate(graph.passes))
    return dataclasses.replace(graph, passes=passes)


def is_on_host(graph: LayerGraph) -> bool:
    return any(span.kv_host_bytes for entry in graph.passes for span in entry.spans)


def host_layers(graph: LayerGraph) -> frozenset[int]:
    """Return the layers whose keys and values wait in host memory; these run on GPUs."""
    return frozenset(
        index for entry in graph.passes for index, span in enumerate(entry.per_layer()) if span.kv_host_bytes
    )


def host_bytes(spans: Sequence[Span]) -> int:
    """Return what a layer's cache takes of host memory at the longest context, from its spans by pass."""
    return max(span.kv_host_bytes for span in spans)


def down_ns(hardware: Hardware, span: Span, device: str) -> int:
    """Return the time of a layer's keys and values on their way from a device to its host."""
    return _copy_ns(hardware, device, hardware.host(device), span.kv_down_bytes)


def up_ns(hardware: Hardware, span: Span, device: str) -> int:
    """Return the time of a layer's keys and values on their way from the host to a device."""
    return _copy_ns(hardware, hardware.host(device), device, span.kv_up_bytes)


def waited_ns(hardware: Hardware, span: Span, device: str) -> int:
    """Return the time of the copies that a layer's computing waits for."""
    down = down_ns(hardware, span, device)
    return down if is_prefetched(hardware, device) else down + up_ns(hardware, span, device)


def is_prefetched(hardware: Hardware, device: str) -> bool:
    """Tell whether copies up to a device run beside its computing."""
    return device == hardware.gpus[0].name if hardware.gpus else False


def _copy_ns(hardware: Hardware, source: str, target: str, nbytes: int) -> int:
    if nbytes == 0:
        return 0
    link = hardware.link(source, target)
    return link.latency_ns * _TENSORS + nbytes * 10**9 // link.bytes_per_s


def _moved(entry: Pass, begun: Sequence[Span], *, is_first: bool) -> Pass:
    """Return one pass with its cache in host memory; begun: the spans of the first pass."""
    spans = entry.per_layer()
    cached = [index for index, span in enumerate(spans) if span.kv_after_bytes]
    following = {index: spans[after].kv_before_bytes for index, after in itertools.pairwise(cached)}
    if cached:
        following[cached[-1]] = spans[cached[0]].kv_after_bytes
    ahead = 0 if is_first or not cached else spans[cached[0]].kv_before_bytes
    result: list[Span] = []
    for index, span in enumerate(spans):
        coming = following.get(index, 0)
        changed = dataclasses.replace(
            span,
            count=1,
            held_bytes=span.held_bytes + ahead,
            peak_bytes=span.peak_bytes + coming,
            kv_before_bytes=0,
            kv_after_bytes=0,
            kv_host_bytes=_pinned_bytes(begun[index].kv_after_bytes, span.kv_after_bytes),
            kv_down_bytes=span.kv_after_bytes,
            kv_up_bytes=span.kv_before_bytes,
        )
        ahead = coming if index in following else ahead
        if result and dataclasses.replace(result[-1], count=1) == changed:
            result[-1] = dataclasses.replace(result[-1], count=result[-1].count + 1)
        else:
            result.append(changed)
    return dataclasses.replace(entry, spans=tuple(result), holdings=(), lasting=())


def _pinned_bytes(first: int, now: int) -> int:
    """Return what keys and values take of pinned memory that grew from `first` to `now` bytes."""
    if now == 0:
        return 0
    least, most = (_power_of_two(-(-nbytes // _TENSORS)) for nbytes in (min(first, now) or now, now))
    return _TENSORS * (2 * most - least)


def _power_of_two(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length()
