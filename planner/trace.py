"""A model → LayerGraph: one run of the real `generate` (or `forward`) with fake numbers, on no device."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner import execution as implementations
from planner.errors import PlanError, TraceError
from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span
from planner.layers import find_layers, loose_tensors, ties, weight_groups
from planner.recorder import Recorder
from planner.workload import Workload


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
        skeleton.set_experts_implementation(experts)
    layers = find_layers(skeleton)
    recorder = Recorder(skeleton, layers, workload, fake)
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
    if getattr(model, "_is_stateful", False):
        raise TraceError(f"{name} keeps a state instead of a KV cache: only models with attention are carried yet")
    if getattr(config, "is_encoder_decoder", False):
        raise TraceError(f"{name} is an encoder-decoder: only decoder-only language models are carried yet")


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


def _graph(model: Any, layers: list[tuple[str, torch.nn.Module]], recorder: Recorder, workload: Workload) -> LayerGraph:
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
        ties=ties(model),
        loose=loose_tensors(model, layers),
        passes=passes,
    )


def _passes(recorder: Recorder, workload: Workload) -> tuple[Pass, ...]:
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
