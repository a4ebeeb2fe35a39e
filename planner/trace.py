"""A model → LayerGraph: one run of the real `generate` (or `forward`) with fake numbers, on no device.

Layers of one kind behave alike: each kind is run twice in every pass (the first, which follows something else, and
one that follows its like), and later ones replay the last run: they fill their part of the cache and hand on a fresh
output, so that a model of 126 layers is traced at the price of a few.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner import execution as implementations
from planner.errors import PlanError, TraceError
from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span, Tensor, WeightGroup
from planner.storages import StorageTracer, nbytes_of
from planner.workload import Workload

# A kind's first layers that are run for real in each pass; later ones replay the last of them.
RUNS_BEFORE_REPLAY = 2


def trace(model: torch.nn.Module, workload: Workload, *, experts: str | None = None) -> LayerGraph:
    """Return the layer graph of a causal language model of transformers, on meta or loaded; its weights are not read.

    experts: the experts implementation to trace, of models that have one.

    Raises:
        TraceError: the model is of a kind that is not carried yet, or failed while it was traced.
    """
    check_carried(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(model, fake)
    if experts is not None:
        implementations.register()
        skeleton.set_experts_implementation(experts)  # type: ignore[operator]
    layers = find_layers(skeleton)
    recorder = _Recorder(skeleton, layers, workload, fake)
    try:
        with _quiet(), torch.no_grad():
            recorder.run()
    except PlanError:
        raise
    except Exception as exc:
        raise TraceError(f"{type(model).__name__} could not be traced: {type(exc).__name__}: {exc}") from exc
    return _graph(skeleton, layers, recorder, workload)


def check_carried(model: torch.nn.Module) -> None:
    """Raise TraceError unless `model` is a decoder-only language model of transformers."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "prepare_inputs_for_generation"):
        raise TraceError(f"{name} is not a language model of transformers: only those are carried yet")
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"{name} is an encoder-decoder: only decoder-only language models are carried yet")


def find_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Return (path, module) of every layer, in registration order.

    A layer is a module whose class the model names in `_no_split_modules`, or, outside of those, a module that has
    parameters of its own.
    """
    whole = {str(name) for name in (getattr(model, "_no_split_modules", None) or ())}
    found: list[tuple[str, torch.nn.Module]] = []

    def walk(path: str, module: torch.nn.Module) -> None:
        own = next(module.parameters(recurse=False), None) is not None
        if type(module).__name__ in whole or own:
            found.append((path, module))
            return
        for name, child in module.named_children():
            walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def _skeleton(model: torch.nn.Module, fake: FakeTensorMode) -> Any:
    """Return a copy of `model` whose tensors are fake; ties are kept and no byte of a weight is copied."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        stand_in: torch.Tensor = FakeTensor(fake, meta, torch.device("cpu"))
        if isinstance(tensor, torch.nn.Parameter):
            stand_in = torch.nn.Parameter(stand_in, requires_grad=False)
        memo[id(tensor)] = stand_in
    return copy.deepcopy(model, memo).eval()


class _Recorder:
    """Runs the skeleton and keeps, for every pass, one span per layer."""

    def __init__(
        self, model: Any, layers: list[tuple[str, torch.nn.Module]], workload: Workload, fake: FakeTensorMode
    ):
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
        self.tracer.ignored = {
            t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())
        }
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
            module.forward = self._wrapped(index, module)  # type: ignore[method-assign]

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
def _recording_updates(recorder: _Recorder) -> Iterator[None]:
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _graph(model: Any, layers: list[tuple[str, torch.nn.Module]], recorder: _Recorder, workload: Workload) -> LayerGraph:
    missing = [layers[index][0] for index in range(len(layers)) if index not in recorder.order]
    if missing:
        raise TraceError(f"layer {missing[0]} is not called by the model's forward: not carried yet")
    kinds: dict[Any, int] = {}
    kind_values: list[LayerKind] = []
    placed: list[Layer] = []
    for index in recorder.order:
        name, module = layers[index]
        groups = weight_groups(module)
        key = (type(module).__name__, groups)
        if key not in kinds:
            kinds[key] = len(kind_values)
            kind_values.append(LayerKind(name=type(module).__name__, groups=groups))
        placed.append(Layer(name=name, kind=kinds[key]))
    passes = _passes(recorder, workload)
    return LayerGraph(
        model=type(model).__name__,
        batch_size=workload.batch_size,
        kinds=tuple(kind_values),
        layers=tuple(placed),
        edges=_edges(passes),
        ties=_ties(model),
        loose=_loose(model, layers),
        passes=passes,
    )


def _passes(recorder: _Recorder, workload: Workload) -> tuple[Pass, ...]:
    prompt, new = workload.prompt_tokens, workload.new_tokens
    shapes = [("prefill", prompt, prompt)]
    if workload.caller == "generate" and new > 1:
        shapes.append(("decode_first", 1, prompt + 1))
        if new > 2:
            shapes.append(("decode_last", 1, prompt + new - 1))
    if len(recorder.passes) != len(shapes):
        raise TraceError(f"the model made {len(recorder.passes)} forward passes where {len(shapes)} were expected")
    result = []
    for (name, tokens, context), raw in zip(shapes, recorder.passes, strict=True):
        spans: list[Span] = []
        fields = [name for name in Span.__slots__ if name != "count"]
        for entry in raw:
            values = {field: entry[field] for field in fields}
            if spans and all(getattr(spans[-1], field) == value for field, value in values.items()):
                spans[-1] = Span(count=spans[-1].count + 1, **values)
            else:
                spans.append(Span(count=1, **values))
        result.append(Pass(name=name, tokens=tokens, context_tokens=context, spans=tuple(spans)))
    return tuple(result)


def _edges(passes: tuple[Pass, ...]) -> tuple[Edge, ...]:
    prefill = passes[0].per_layer()
    decode = passes[-1].per_layer() if len(passes) > 1 else None
    return tuple(
        Edge(
            source=index,
            target=index + 1,
            prefill_bytes=prefill[index + 1].input_bytes,
            decode_bytes=decode[index + 1].input_bytes if decode else 0,
        )
        for index in range(len(prefill) - 1)
    )


def weight_groups(layer: torch.nn.Module) -> tuple[WeightGroup, ...]:
    """Return the weight groups of one layer.

    Fused experts are a group whose slices are the experts. Every other child with a matrix is a group. What is left
    (norms, routers smaller than an expert, tensors of the layer itself) is the group "rest", which always waits where
    its layer runs. A layer without children is one group, "weights", that does too.
    """
    if next(layer.named_children(), None) is None:
        tensors = tuple(_tensor(name, value, layer) for name, value in _named_tensors(layer))
        return (WeightGroup(name="weights", slices=1, used_slices=1, streamable=False, tensors=tensors),)
    experts = implementations.experts_modules(layer)
    owners: list[str] = list(experts)
    for child_name, child in layer.named_children():
        if not any(path == child_name or path.startswith(child_name + ".") for path in experts):
            owners.append(child_name)
            continue
        # What stands beside experts (shared experts, a router) are groups of their own.
        paths = [f"{child_name}.{grandchild}" for grandchild, _ in child.named_children()]
        owners += [path for path in paths if path not in experts]
    members: dict[str, list[Tensor]] = {}
    for name, value in _named_tensors(layer):
        owner = max((path for path in owners if name.startswith(path + ".")), key=len, default="rest")
        members.setdefault(owner, []).append(_tensor(name, value, layer))
    groups: list[WeightGroup] = []
    small = [tensor for tensor in members.pop("rest", [])]
    expert_bytes = {
        path: sum(p.numel() * p.element_size() for p in module.parameters()) // int(module.num_experts)  # type: ignore[call-overload]
        for path, module in experts.items()
    }
    for name, tensors in members.items():
        if name in experts:
            used = _top_k(layer, experts[name])
            groups.append(
                WeightGroup(
                    name=name,
                    slices=int(experts[name].num_experts),  # type: ignore[call-overload]
                    used_slices=used,
                    streamable=True,
                    tensors=tuple(tensors),
                )
            )
        elif not any(len(tensor.shape) > 1 for tensor in tensors) or (
            "." in name and sum(tensor.nbytes for tensor in tensors) < min(expert_bytes.values(), default=0)
        ):
            small += tensors
        else:
            groups.append(WeightGroup(name=name, slices=1, used_slices=1, streamable=True, tensors=tuple(tensors)))
    if small:
        groups.append(WeightGroup(name="rest", slices=1, used_slices=1, streamable=False, tensors=tuple(small)))
    return tuple(groups)


def _top_k(layer: torch.nn.Module, experts: torch.nn.Module) -> int:
    for module in layer.modules():
        value = getattr(module, "top_k", None)
        if isinstance(value, int):
            return value
    config: Any = experts.config
    for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "top_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise TraceError(f"{type(experts).__name__}: how many experts a token uses is not known for this model yet")


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensor(name: str, value: torch.Tensor, owner: torch.nn.Module) -> Tensor:
    path, _, leaf = name.rpartition(".")
    parent = owner.get_submodule(path)
    is_buffer = leaf in parent._buffers
    return Tensor(
        name=name,
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        nbytes=value.numel() * value.element_size(),
        buffer=is_buffer,
        persistent=not is_buffer or leaf not in parent._non_persistent_buffers_set,
    )


def _ties(model: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, value in _named_tensors(model):
        names.setdefault(id(value), []).append(name)
    return tuple(tuple(sorted(group)) for group in names.values() if len(group) > 1)


def _loose(model: torch.nn.Module, layers: list[tuple[str, torch.nn.Module]]) -> tuple[Tensor, ...]:
    inside = [f"{path}." if path else "" for path, _ in layers]
    return tuple(
        _tensor(name, value, model)
        for name, value in _named_tensors(model)
        if not any(name.startswith(prefix) for prefix in inside)
    )
