"""Runs a model's skeleton and keeps, for every pass, one span per layer.

Layers of one kind behave alike: each kind is run twice in every pass (the first, which follows something else, and
one that follows its like), and later ones replay the last run: they fill their part of the cache and hand on a fresh
output, so that a model of 126 layers is traced at the price of a few.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner import execution as implementations
from planner.errors import TraceError
from planner.storages import StorageTracer, nbytes_of
from planner.workload import Workload

# A kind's first layers that are run for real in each pass; later ones replay the last of them.
RUNS_BEFORE_REPLAY = 2


class Recorder:
    """Wraps the model and its layers; `run` traces. Spans are dicts until they are whole, in `passes`.

    order: indices of layers as they are called.
    """

    def __init__(self, model: Any, layers: list[tuple[str, torch.nn.Module]], workload: Workload, fake: FakeTensorMode):
        self.model, self.workload = model, workload
        eos = model.config.get_text_config().eos_token_id
        stops = set(eos if isinstance(eos, list) else [eos])
        safe_token = next(token for token in itertools.count(1) if token not in stops)
        experts = implementations.experts_modules(model).values()
        self.tracer = StorageTracer(
            fake,
            safe_token=safe_token,
            expert_storages=(p.untyped_storage()._cdata for m in experts for p in m.parameters(recurse=False)),
        )
        self.tracer.ignored = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
        self.layers = layers
        self.signatures = [_signature(module) for _, module in layers]
        self.order: list[int] = []
        self.passes: list[list[dict[str, int]]] = []
        self.keep = False
        self._calls = self._start_serial = self._first_call_serial = self._kept_by_caller = 0
        self._open: dict[str, int] | None = None
        self._cache_bytes: dict[int, int] = {}
        self._runs: dict[Any, int] = {}
        self._recorded: dict[Any, _Replay] = {}
        self._updates: list[Any] | None = None
        self._wrap()

    def run(self) -> None:
        """Trace every pass that the workload needs, and leave them in `passes` in the order of the Plan's words."""
        work = self.workload
        ids = torch.ones(work.batch_size, work.prompt_tokens, dtype=torch.long)
        if work.caller == "forward":
            mask = torch.ones_like(ids)
            with self._tracing():
                self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            return
        self._generate(ids, min(work.new_tokens, 3), None)
        if work.new_tokens <= 3:
            return
        del self.passes[2]
        kept_by_caller = self._kept_by_caller
        # The last step, reached by way of two others: what a step leaves behind is held during the next.
        cached = work.prompt_tokens + work.new_tokens - 4
        ids = torch.ones(work.batch_size, cached + 1, dtype=torch.long)
        self._cache_bytes.clear()
        with self._tracing(keep=False):
            cache = self.model(input_ids=ids[:, :cached], use_cache=True).past_key_values
        self._generate(ids, 3, cache)
        del self.passes[2:4]
        # What `generate` made of its input before the first pass it keeps to the end; here that input was longer.
        for span in self.passes[2]:
            span["held_bytes"] += kept_by_caller - self._kept_by_caller

    def _generate(self, ids: torch.Tensor, new_tokens: int, cache: Any) -> None:
        options = {} if cache is None else {"past_key_values": cache}
        if cache is None:
            self._cache_bytes.clear()
        del cache
        mask = torch.ones_like(ids)
        with self._tracing():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=self.workload.sampling == "sample",
                num_beams=1,
                **options,
            )

    @contextlib.contextmanager
    def _tracing(self, *, keep: bool = True) -> Iterator[None]:
        self.keep = keep
        self._calls = 0
        self._start_serial = self.tracer.serial
        self._begin_span()
        with self.tracer, _recording_updates(self):
            yield
        self._close_span()
        self.keep = False

    def _wrap(self) -> None:
        forward = self.model.forward

        @functools.wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            if self.keep:
                if self.passes and not self.passes[-1]:
                    raise TraceError("the model called itself before its first layer: not carried yet")
                if self.passes and self._open is not None and self._open.get("layer") is not None:
                    self._begin_span()
                self.passes.append([])
                self._calls += 1
                if self._calls == 1:
                    self._first_call_serial = self.tracer.serial
                self._kept_by_caller = self.tracer.alive_between(self._start_serial, self._first_call_serial)
            self._runs.clear()
            return forward(*args, **kwargs)

        self.model.forward = whole
        for index, (_, module) in enumerate(self.layers):
            module.forward = self._wrapped(index, module)

    def _wrapped(self, index: int, module: torch.nn.Module) -> Any:
        forward = module.forward

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            cache = next((v for v in (*args, *kwargs.values()) if hasattr(v, "get_seq_length")), None)
            inputs = list(_leaves((args, kwargs)))
            if self.keep:
                self._enter_layer(index, nbytes_of(inputs))
            key = (len(self.passes), self.keep, self.signatures[index], tuple(_shape(value) for value in inputs))
            self._runs[key] = self._runs.get(key, 0) + 1
            if self._runs[key] > RUNS_BEFORE_REPLAY and key in self._recorded:
                replay = self._recorded[key]
                if self.keep:
                    replay.copy_span(self.passes[-1])
                return replay.play(cache, module)
            self._updates = []
            out = forward(*args, **kwargs)
            self._recorded[key] = _Replay(self._updates, module, out, len(self.passes[-1]) - 1)
            self._updates = None
            return out

        return call

    def _enter_layer(self, index: int, input_bytes: int) -> None:
        spans = self.passes[-1]
        position = len(spans)
        if len(self.passes) == 1:
            if index in self.order:
                raise TraceError(f"layer {self.layers[index][0]} is called twice in one pass: not carried yet")
            self.order.append(index)
        elif position >= len(self.order) or self.order[position] != index:
            raise TraceError("the order of layers changes between passes: not carried yet")
        if position:
            self._begin_span()
        assert self._open is not None
        self._open["layer"] = index
        self._open["input_bytes"] = input_bytes
        spans.append(self._open)

    def _begin_span(self) -> None:
        self._close_span()
        self._open = {
            "start": self.tracer.live_bytes,
            "held_bytes": self.tracer.live_bytes - sum(self._cache_bytes.values()),
            "kv_before_bytes": 0,
            "kv_after_bytes": 0,
            "input_bytes": 0,
        }
        self.tracer.reset_peak()
        self.tracer.reset_work()

    def _close_span(self) -> None:
        span = self._open
        self._open = None
        if span is not None and self.keep and "layer" in span and "peak_bytes" not in span:
            span["peak_bytes"] = self.tracer.peak_bytes - span["start"]
            span["flops"] = self.tracer.flops
            span["moved_bytes"] = self.tracer.moved_bytes
            span["operators"] = self.tracer.operators

    def cache_updated(self, layer_index: int, layer: Any) -> None:
        """Take note of what the cache now holds for one of its layers."""
        before = self._cache_bytes.get(layer_index, 0)
        after = nbytes_of(_leaves(vars(layer)))
        self._cache_bytes[layer_index] = after
        if self._open is not None:
            self._open["kv_before_bytes"] += before
            self._open["kv_after_bytes"] += after


class _Replay:
    """What a layer did to the cache and what it returned, to be done again by a layer that is alike."""

    def __init__(self, updates: list[Any], module: torch.nn.Module, out: Any, position: int):
        self.updates = [
            (_blueprint(args), _blueprint(kwargs), layer_index - _layer_index(module))
            for args, kwargs, layer_index in updates
        ]
        self.out = _blueprint(out)
        self.position = position

    def play(self, cache: Any, module: torch.nn.Module) -> Any:
        """Fill this layer's part of the cache, and return an output."""
        for args, kwargs, offset in self.updates:
            key, value = _build(args)
            cache.update(key, value, _layer_index(module) + offset, **_build(kwargs))
            del key, value
        return _build(self.out)

    def copy_span(self, spans: list[dict[str, int]]) -> None:
        """Give the newest span the numbers of the one that was recorded."""
        for name in ("peak_bytes", "flops", "moved_bytes", "operators"):
            spans[-1][name] = spans[self.position][name]


@contextlib.contextmanager
def _recording_updates(recorder: Recorder) -> Iterator[None]:
    from transformers.cache_utils import Cache

    original = Cache.update

    def update(self: Any, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if recorder._updates is not None:
            recorder._updates.append(((_Empty.like(key_states), _Empty.like(value_states)), kwargs, layer_idx))
        out = original(self, key_states, value_states, layer_idx, *args, **kwargs)
        recorder.cache_updated(layer_idx, self.layers[layer_idx])
        return out

    Cache.update = update
    try:
        yield
    finally:
        Cache.update = original


class _Empty:
    """The shape and strides of a tensor that is not kept alive."""

    def __init__(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.stride, self.dtype = shape, stride, dtype

    @classmethod
    def like(cls, tensor: torch.Tensor) -> _Empty:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def build(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def _blueprint(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Empty.like(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_blueprint(item) for item in value)
    if isinstance(value, dict):
        return {key: _blueprint(item) for key, item in value.items()}
    return value


def _build(value: Any) -> Any:
    if isinstance(value, _Empty):
        return value.build()
    if isinstance(value, (list, tuple)):
        return type(value)(_build(item) for item in value)
    if isinstance(value, dict):
        return {key: _build(item) for key, item in value.items()}
    return value


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, tensor.dtype)


def _layer_index(module: torch.nn.Module) -> int:
    for child in module.modules():
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int):
            return index
    return 0


def _signature(module: torch.nn.Module) -> tuple[Any, ...]:
    """Return what makes two layers alike: classes, plain attributes but the layer's number, and tensors."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        plain = {
            key: value
            for key, value in vars(child).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training", "layer_id")
        }
        parts.append((name, type(child).__qualname__, tuple(sorted(plain.items()))))
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    parts += [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    return tuple(parts)
