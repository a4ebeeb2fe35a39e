"""A model → LayerGraph: runs of the real `generate` (or `forward`) with fake numbers, on no device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from planner import execution as implementations
from planner.errors import PlanError, TraceError
from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span
from planner.inputs import Inputs
from planner.journal import Taken, holdings_of
from planner.layers import find_layers, loose_tensors, ties, walk, weight_groups
from planner.lifetimes import Event
from planner.recorder import RawSpan, Recorder, Run
from planner.storages import Kernels, StorageTracer
from planner.template import leaves
from planner.workload import Workload

# Steps traced from the start of the answer; a later one is reached through two others, with a prompt that much longer,
# because what one step leaves behind is held during the next.
_FIRST_STEPS = 3
# Numbers of a tensor that a module keeps beside its weights are known up to this many elements.
_SMALL_ELEMENTS = 2**12
# The path of a module in an error is cut off after so many characters.
_LONGEST_PATH = 80
_KNOWN_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64,
    torch.float16, torch.bfloat16,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TracedPass:
    """One pass: its events and spans (whose positions count from its start), and what is held when it starts.

    held_bytes: neither weights, cache, scratch nor library workspaces. library_bytes: workspaces taken before.
    scratch_bytes: tensors that no operator returned and that stay, such as scalars lifted from Python numbers.
    held_by: held_bytes by who made them, and the caller's scalars. taken: what layers are handed in it.
    """

    run: Run
    events: list[Event]
    spans: list[RawSpan]
    tokens: int
    context_tokens: int
    held_bytes: int
    cached_bytes: int
    library_bytes: int
    scratch_bytes: int
    held_by: dict[int | None, int]
    taken: list[Taken]

    def holding(self, held_bytes: int) -> TracedPass:
        """Return the pass with so many bytes held at its start; what is more is the caller's."""
        held_by = {**self.held_by, None: self.held_by.get(None, 0) + held_bytes - self.held_bytes}
        return dataclasses.replace(self, held_bytes=held_bytes, held_by=held_by)


class Tracing:
    """One model's skeleton under one workload; passes are run when they are asked for.

    experts: the experts implementation to trace, of models that have one. kernels: what adds scratch to the stream.
    attention: a context that makes attention run as another device would. routing_seed: draws the routing of experts
    instead of the worst one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        workload: Workload,
        *,
        examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
        experts: str | None = None,
        kernels: Kernels | None = None,
        attention: contextlib.AbstractContextManager[Any] | None = None,
        routing_seed: int | None = None,
        replay: bool = True,
    ):
        self.model, self.workload, self.kernels, self.routing_seed = model, workload, kernels, routing_seed
        self.attention = attention
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        # What is not of transformers makes no use of numbers that are made up.
        self.strict = not (hasattr(model, "main_input_name") or implementations.experts_modules(model))
        self.skeleton = _skeleton(model, self.fake, with_integers=self.strict)
        if experts is not None:
            implementations.register()
            self.skeleton.set_experts_implementation(experts)
        self.layers = find_layers(self.skeleton)
        # Only layers of transformers are known to keep what they do apart from where they are: hooks, counters.
        self.recorder = Recorder(self.skeleton, self.layers, replay=replay and not self.strict)
        self.inputs = Inputs(self.skeleton, workload, self.fake, examples)
        if self.strict and any(module.training for module in model.modules()):
            self.inputs.notes.append(f"{type(model).__name__} as in evaluation (it was given in training mode)")
        self._first: Run | None = None
        self._later: dict[int, TracedPass] = {}

    @property
    def first(self) -> Run:
        """The run from the start: prefill, and the first decode steps."""
        if self._first is None:
            left_out = self.inputs.chunks.count - len(self.inputs.chunks.sizes())
            self._first = self._record(passes=min(self.inputs.steps, self._settled + 1) - left_out)
        return self._first

    @property
    def _settled(self) -> int:
        """The last call of the first run: decode steps after it do as it did, or are reached by a longer prompt."""
        return self.inputs.chunks.count - 1 + _FIRST_STEPS

    def step(self, number: int) -> TracedPass:
        """Return forward call `number` of the workload; 0 is the prefill, or the first chunk of it.

        Of many chunks, those in the middle are not traced one by one: `inputs.chunks.numbers` says which are.
        """
        cut_up = self.inputs.chunks
        if number < cut_up.count:
            at = cut_up.numbers().index(number)
            return cut(self.first, at, cut_up.tokens_of(number), cut_up.ends_at(number))
        if number <= self._settled:
            at = number - cut_up.count + len(cut_up.sizes())
            return cut(self.first, at, 1, self._context(number))
        if number not in self._later:
            self._later[number] = self._steady(number) or self._reach(number)
        return self._later[number]

    def _context(self, number: int) -> int:
        """Return the tokens in the cache when decode step `number` ends."""
        return self.workload.prompt_tokens + number - self.inputs.chunks.count + 1

    def _steady(self, number: int) -> TracedPass | None:
        """Return step `number` where no layer does more from step to step: the cache is full, or never grows."""
        before, after = self.step(self._settled - 1), self.step(self._settled)
        if before.cached_bytes != after.cached_bytes or not _same_layers(before, after):
            return None
        return self.continued(number)

    def _reach(self, number: int) -> TracedPass:
        """Run step `number` after a longer prompt, and make up for what the caller holds of that."""
        longer = number - self._settled
        run = self._record(longer=longer, new_tokens=self.workload.new_tokens - longer, passes=_FIRST_STEPS + 1)
        reached = cut(run, _FIRST_STEPS, 1, self._context(number))
        before, after = (self.step(index).held_bytes for index in (self._settled - 1, self._settled))
        reached = reached.holding(after + longer * (after - before))
        if self.workload.num_beams > 1:
            # Beam search holds tensors as long as the answer may get, which is less after a longer prompt.
            onward = self.continued(number)
            if onward is not None and _same_layers(reached, onward):
                return onward
        return reached

    def continued(self, number: int) -> TracedPass | None:
        """Return step `number` as the first steps go on, every block growing as it did between the last two of them.

        None where those two do not do the same.
        """
        before, after = self.step(self._settled - 1), self.step(self._settled)
        if [(e.nbytes > 0, e.kind) for e in before.events] != [(e.nbytes > 0, e.kind) for e in after.events]:
            return None
        ahead = number - self._settled

        def onward(one: int, two: int) -> int:
            return two + ahead * (two - one)

        pairs = zip(before.events, after.events, strict=True)
        taken = after.taken
        if len(before.taken) == len(taken):
            sizes = [onward(a.nbytes, b.nbytes) for a, b in zip(before.taken, taken, strict=True)]
            taken = [dataclasses.replace(entry, nbytes=size) for entry, size in zip(taken, sizes, strict=True)]
        return dataclasses.replace(
            after.holding(onward(before.held_bytes, after.held_bytes)),
            events=[Event(b.block, onward(a.nbytes, b.nbytes), b.kind) for a, b in pairs],
            taken=taken,
            context_tokens=self._context(number),
            cached_bytes=onward(before.cached_bytes, after.cached_bytes),
        )

    def weights(self) -> list[int]:
        """Return the bytes of every parameter and buffer, ties once, in the order of `.to(device)`."""
        sizes: dict[int, int] = {}
        met: set[int] = set()
        waiting: list[tuple[torch.nn.Module, bool]] = [(self.skeleton, False)]
        while waiting:
            module, children_done = waiting.pop()
            if not children_done and id(module) not in met:
                met.add(id(module))
                waiting.append((module, True))
                waiting += [(child, False) for child in reversed(module._modules.values()) if child is not None]
            elif children_done:
                for tensor in itertools.chain(module._parameters.values(), module._buffers.values()):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        sizes[storage._cdata] = storage.nbytes()
        return list(sizes.values())

    def _record(self, *, passes: int, longer: int = 0, new_tokens: int | None = None) -> Run:
        call = self.inputs.call(longer=longer, new_tokens=new_tokens)
        experts = implementations.experts_modules(self.skeleton).values()
        tracer = StorageTracer(
            self.fake,
            stop_tokens=_stop_tokens(self.skeleton),
            kernels=self.kernels,
            expert_storages=(p.untyped_storage()._cdata for m in experts for p in m.parameters(recurse=False)),
            routing_seed=self.routing_seed,
            strict=self.strict,
        )
        try:
            # Random numbers are drawn for real where they are integers.
            with (
                _quiet(),
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                self.attention or contextlib.nullcontext(),
            ):
                run = self.recorder.record(call, tracer, passes=passes)
            if tracer.refused is not None:
                raise tracer.refused
        except Exception as exc:
            if isinstance(exc, PlanError) and not isinstance(exc, TraceError):
                raise
            raise self._failure(tracer.refused or exc, tracer.refused_in) from exc
        if len(run.passes) != passes:
            raise TraceError(
                f"{type(self.model).__name__} made {len(run.passes)} forward passes where {passes} were expected"
            )
        return run

    def _failure(self, exc: Exception, module: torch.nn.Module | None) -> TraceError:
        """Return an error that names the operator and the module (where not given, the innermost) that `exc` is of."""
        operator = ""
        if module is None:
            for frame, _ in traceback.walk_tb(exc.__traceback__):
                owner = frame.f_locals.get("self")
                if isinstance(owner, torch.nn.Module):
                    module = owner
                elif isinstance(owner, StorageTracer) and "func" in frame.f_locals:
                    operator = f"{frame.f_locals['func']}: "
        where = self.recorder.where()
        if module is not None:
            path = next((path for path, other in walk(self.skeleton) if other is module), "")
            where = f" in {path if len(path) <= _LONGEST_PATH else path[:_LONGEST_PATH] + '...'!r}" if path else ""
        reason = str(exc) if isinstance(exc, TraceError) else f"{operator}{type(exc).__name__}: {exc}"
        if isinstance(exc, RecursionError):
            # Where Python stopped says nothing, and depends on who called.
            reason = f"RecursionError: calls nest deeper than {sys.getrecursionlimit()} (see sys.setrecursionlimit)"
        return TraceError(f"{type(self.model).__name__} could not be traced{where}: {reason}")

    def graph(self, *, allocator_bytes: int = 0, by_maker: bool = False) -> LayerGraph:
        """Return the layer graph, with the prefill (of chunks, those that a LayerGraph names), the first decode step
        and the last. by_maker: with whose tensors are held, for layers on several devices.
        """
        steps, prefill = self.inputs.steps, self.inputs.chunks
        decode = {steps - 1: "decode_last", prefill.count: "decode_first"} if steps > prefill.count else {}
        names = {**prefill.named(), **decode}
        traced = [(names[number], self.step(number)) for number in sorted(names)]
        return _graph(self.skeleton, self.recorder, traced, self.workload, allocator_bytes, by_maker)


def cut(run: Run, index: int, tokens: int, context_tokens: int) -> TracedPass:
    """Return pass `index` of a run by itself."""
    raw = run.passes[index]
    held = cached = library = scratch = 0
    held_by: dict[int | None, int] = {}
    for event in run.events[: raw.start]:
        if event.kind == "library":
            library += event.nbytes
        elif event.kind == "scratch":
            scratch += event.nbytes
        elif event.block in run.cache_blocks:
            cached += event.nbytes
        else:
            held += event.nbytes
        if event.block in run.makers and event.block not in run.cache_blocks:
            maker = run.makers[event.block]
            held_by[maker] = held_by.get(maker, 0) + event.nbytes
    return TracedPass(
        run=run,
        events=run.events[raw.start : raw.end],
        spans=[dataclasses.replace(s, start=s.start - raw.start, end=s.end - raw.start) for s in raw.spans],
        tokens=tokens,
        context_tokens=context_tokens,
        held_bytes=held,
        cached_bytes=cached,
        library_bytes=library,
        scratch_bytes=scratch,
        held_by=held_by,
        taken=[entry for taken in run.taken if (entry := taken.within(raw.start, raw.end)).takes],
    )


def _same_layers(one: TracedPass, other: TracedPass) -> bool:
    """Tell whether two passes do the same in every layer but the first and last, which the caller's code adjoins."""
    if [span.layer for span in one.spans] != [span.layer for span in other.spans]:
        return False
    return all(
        [e.nbytes for e in one.events[a.start : a.end]] == [e.nbytes for e in other.events[b.start : b.end]]
        for a, b in list(zip(one.spans, other.spans, strict=True))[1:-1]
    )


def trace(
    model: torch.nn.Module,
    workload: Workload,
    *,
    experts: str | None = None,
    examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> LayerGraph:
    """Return the layer graph of a model, on meta or loaded; its weights are not read.

    experts: the experts implementation to trace, of models that have one. examples: inputs to trace it by, needed for
    modules that are not of transformers.

    Raises:
        TraceError: the model cannot be traced, and where.
    """
    return Tracing(model, workload, experts=experts, examples=examples).graph()


def _stop_tokens(model: Any) -> list[int]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    found: list[int] = []
    for owner in (config.get_text_config(), getattr(model, "generation_config", None)):
        stops = getattr(owner, "eos_token_id", None)
        found += [token for token in (stops if isinstance(stops, list) else [stops]) if token is not None]
    return found


def _skeleton(model: torch.nn.Module, fake: FakeTensorMode, *, with_integers: bool) -> Any:
    """Return a copy of `model` whose tensors are fake; ties are kept and no byte of a weight is copied.

    with_integers: buffers of integers keep their numbers, where they have any.
    """
    memo: dict[int, Any] = {}
    modules = list(walk(model))
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            which = repr(path) if path else "the model"
            raise TraceError(
                f"{which} is a {type(module).__name__}, compiled by torch.jit, which hides its operators: give the "
                "module that it was made from"
            )
        for leaf, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                known = with_integers and leaf in module._buffers
                memo[id(tensor)] = _stand_in(tensor, f"{path}.{leaf}" if path else leaf, model, fake, known=known)
    for path, module in modules:
        for leaf, value in vars(module).items():
            for tensor in leaves(value) if leaf not in ("_parameters", "_buffers") else ():
                # State that a module keeps beside its weights; small numbers may be looked at.
                if id(tensor) not in memo:
                    known = tensor.numel() <= _SMALL_ELEMENTS or not tensor.dtype.is_floating_point
                    memo[id(tensor)] = _stand_in(tensor, f"{path}.{leaf}" if path else leaf, model, fake, known=known)
    # Children first, so that a deep model needs no deep recursion and what cannot be copied has a name.
    for path, module in reversed(modules):
        try:
            copy.deepcopy(module, memo)
        except Exception as exc:
            raise TraceError(_not_copied(module, path, memo, exc)) from exc
    skeleton = memo[id(model)]
    try:
        skeleton.eval()
    except RecursionError:
        # A module inside itself; torch's own walk does not end.
        for _, module in walk(skeleton):
            module.training = False
    return skeleton


def _stand_in(
    tensor: torch.Tensor, name: str, model: torch.nn.Module, fake: FakeTensorMode, *, known: bool
) -> torch.Tensor:
    """Return a fake tensor laid out as `tensor` is, or a copy of its numbers where they shall be `known`."""
    if torch.nn.parameter.is_lazy(tensor):
        raise TraceError(
            f"{name} has no shape yet: run {type(model).__name__} once, or give its modules their input sizes"
        )
    odd = None
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not isinstance(tensor, FakeTensor):
        odd = f"a {type(tensor).__name__}, which does its own operators"
    elif tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        odd = f"of {tensor.dtype} and laid out as {'nested' if tensor.is_nested else tensor.layout}"
    if odd is not None:
        raise TraceError(f"{name} is {odd}: only plain tensors can be traced; convert it to one")
    if known and not tensor.is_meta and not isinstance(tensor, FakeTensor) and tensor.dtype in _KNOWN_DTYPES:
        return tensor.detach().clone().cpu()
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    result: torch.Tensor = FakeTensor(fake, meta, torch.device("cpu"))
    if isinstance(tensor, torch.nn.Parameter):
        # Autocast keeps its casts of what requires a gradient, and embedding bags return more for it.
        result = torch.nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _not_copied(module: torch.nn.Module, path: str, memo: Mapping[int, Any], exc: Exception) -> str:
    """Return which attribute of a module cannot be copied, in words."""
    for leaf, value in vars(module).items():
        try:
            copy.deepcopy(value, dict(memo))
        except Exception as cause:
            what = f"{path}.{leaf}" if path else leaf
            return (
                f"{what} (a {type(value).__name__}) cannot be copied, and a model is traced by a copy of it: "
                f"{type(cause).__name__}: {cause}"
            )
    which = repr(path) if path else "the model"
    return f"{which} (a {type(module).__name__}) cannot be copied: {type(exc).__name__}: {exc}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    # What fails in an operator is told by a TraceError.
    operators = getLogger("torch._subclasses.fake_tensor")
    was_disabled, operators.disabled = operators.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        operators.disabled = was_disabled


def _graph(
    model: Any,
    recorder: Recorder,
    traced: list[tuple[str, TracedPass]],
    workload: Workload,
    allocator_bytes: int,
    by_maker: bool,
) -> LayerGraph:
    layers = recorder.layers
    order: dict[int, None] = {}
    for _, entry in traced:
        order.update(dict.fromkeys(span.layer for span in entry.spans if span.layer >= 0))
    # What no pass calls still has weights, which live with what is called.
    order.update(dict.fromkeys(range(len(layers))))
    position = {index: at for at, index in enumerate(order)}
    calls = [Counter(span.layer for span in entry.spans) for _, entry in traced]
    again = {index for counted in calls for index, count in counted.items() if count > 1}
    kinds: dict[Any, int] = {}
    kind_values: list[LayerKind] = []
    placed: list[Layer] = []
    for index in order:
        name, module = layers[index]
        groups = tuple(
            dataclasses.replace(
                group,
                streamable=group.streamable and not recorder.is_borrowed(index, group.name),
                by_rows=recorder.is_looked_up(module),
            )
            for group in weight_groups(module)
        )
        key = (type(module).__name__, groups)
        if key not in kinds:
            kinds[key] = len(kind_values)
            kind_values.append(LayerKind(name=type(module).__name__, groups=groups))
        placed.append(Layer(name=name, kind=kinds[key], called_again=index in again))
    return LayerGraph(
        model=type(model).__name__,
        batch_size=workload.rows,
        kinds=tuple(kind_values),
        layers=tuple(placed),
        edges=_edges(traced, position),
        ties=ties(model),
        loose=loose_tensors(model, layers),
        allocator_bytes=allocator_bytes,
        passes=tuple(_pass(name, entry, position, by_maker=by_maker) for name, entry in traced),
    )


def _pass(name: str, entry: TracedPass, position: dict[int, int], *, by_maker: bool) -> Pass:
    spans: list[Span] = []
    for values in _layer_spans(entry, position):
        if spans and all(getattr(spans[-1], field) == value for field, value in values.items()):
            spans[-1] = Span(count=spans[-1].count + 1, **values)
        else:
            spans.append(Span(count=1, **values))
    made = Pass(name=name, tokens=entry.tokens, context_tokens=entry.context_tokens, spans=tuple(spans))
    if not by_maker:
        return made
    holdings, lasting = holdings_of(
        events=entry.events,
        spans=entry.spans,
        held={maker: nbytes for maker, nbytes in entry.held_by.items() if nbytes},
        taken=entry.taken,
        makers=entry.run.makers,
        cache_blocks=entry.run.cache_blocks,
        position=position,
    )
    return dataclasses.replace(made, holdings=holdings, lasting=lasting)


def _layer_spans(entry: TracedPass, position: dict[int, int]) -> list[dict[str, int]]:
    """Return the fields of one Span for every layer of the graph; a layer that is called twice has both in one."""
    result: list[dict[str, int]] = [dict.fromkeys(_SPAN_FIELDS, 0) for _ in position]
    called: set[int] = set()
    for span, memory in zip(entry.spans, span_memory(entry), strict=True):
        values = result[position[max(span.layer, 0)]]
        if span.layer in called:
            top = max(values["held_bytes"] + values["peak_bytes"], memory.held_bytes + memory.peak_bytes)
            values["held_bytes"] = min(values["held_bytes"], memory.held_bytes)
            values["peak_bytes"] = top - values["held_bytes"]
        else:
            values["held_bytes"], values["peak_bytes"] = memory.held_bytes, memory.peak_bytes
            values["kv_before_bytes"] = span.kv_before_bytes
            called.add(span.layer)
        values["scratch_bytes"] = max(values["scratch_bytes"], memory.scratch_bytes)
        values["kv_after_bytes"] = span.kv_after_bytes
        for name in ("input_bytes", "flops", "moved_bytes", "operators"):
            values[name] += getattr(span, name)
    return result


@dataclass(frozen=True, slots=True)
class SpanMemory:
    """What one span holds: bytes at its start without and with the cache, and the most above that.

    scratch_bytes: what kernels add to that most, workspaces that libraries keep apart.
    """

    held_bytes: int
    cached_bytes: int
    peak_bytes: int
    scratch_bytes: int


def span_memory(entry: TracedPass) -> list[SpanMemory]:
    """Return what every span of a pass holds, by playing its events."""
    blocks = entry.run.cache_blocks
    held, cached, extra = entry.held_bytes, entry.cached_bytes, entry.scratch_bytes
    result = []
    at = 0
    for span in entry.spans:
        assert span.start == at, "spans leave no event out"
        before = held, cached
        most, most_asked = held + cached, held + cached + extra
        for event in entry.events[span.start : span.end]:
            if event.kind == "scratch":
                extra += event.nbytes
            elif event.kind == "library":
                continue
            elif event.block in blocks:
                cached += event.nbytes
            else:
                held += event.nbytes
            most, most_asked = max(most, held + cached), max(most_asked, held + cached + extra)
        at = span.end
        result.append(SpanMemory(before[0], before[1], most - sum(before), most_asked - most))
    return result


_SPAN_FIELDS = tuple(name for name in Span.__slots__ if name != "count")


def _edges(traced: list[tuple[str, TracedPass]], position: dict[int, int]) -> tuple[Edge, ...]:
    """Return who uses what others made, as bytes of distinct blocks, in the prefill and in the last step.

    Blocks that one layer makes for the same others are one tensor.
    """
    sizes: list[dict[tuple[int, tuple[int, ...]], int]] = []
    for _, entry in (traced[0], traced[-1]):
        run = entry.run
        made = {event.block: event.nbytes for event in entry.events if event.nbytes > 0}
        users: dict[int, set[int]] = {}
        for block, user in run.flows:
            is_handed_on = block in made and user >= 0 and block not in run.cache_blocks
            if is_handed_on and position[run.maker[block]] < position[user]:
                users.setdefault(block, set()).add(position[user])
        found: dict[tuple[int, tuple[int, ...]], int] = {}
        for block, taken_by in users.items():
            key = (position[run.maker[block]], tuple(sorted(taken_by)))
            found[key] = found.get(key, 0) + made[block]
        sizes.append(found)
    prefill, decode = sizes
    if not traced[-1][0].startswith("decode"):
        decode = {}
    keys = sorted(prefill.keys() | decode.keys())
    of_source: dict[int, list[tuple[int, ...]]] = {}
    for source, targets in keys:
        of_source.setdefault(source, []).append(targets)
    edges = [
        Edge(
            source=source,
            target=target,
            prefill_bytes=prefill.get((source, targets), 0),
            decode_bytes=decode.get((source, targets), 0),
            tensor=str(of_source[source].index(targets)) if len(of_source[source]) > 1 else "",
        )
        for source, targets in keys
        for target in targets
    ]
    return tuple(sorted(edges, key=lambda edge: (edge.source, edge.target, edge.tensor)))
