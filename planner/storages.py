"""Follows every storage that operators make, and counts their arithmetic, while a model runs without its numbers.

Floating tensors are fake (shape and dtype only, on a pretended CPU); integer and boolean tensors are real, so that
code which looks at them (padding masks, stopping criteria, router offsets) runs as it would. In a model of
transformers an integer result of fake inputs becomes a harmless constant; a router's top-k becomes experts 0..k-1 for
every token, which is the worst routing for memory, or a seeded draw where an expected value is asked for. In any other
module such integers stay fake, and to look at one is a TraceError, as it is to look at a float in any module.

Known limitations: tensors made from Python numbers by `torch.tensor(x)` are seen when an operator lifts them, and are
not operator outputs.
"""

from __future__ import annotations

import itertools
import math
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import TraceError
from planner.journal import CALLER, Journal, Taken
from planner.lifetimes import OUTPUTS_ONLY, Event, Kind, Scratch

aten = torch.ops.aten

# Real integer tensors larger than this many elements (a causal mask of 8k by 8k tokens) are kept fake.
LARGEST_REAL_ELEMENTS = 2**26
_LARGE_INPUT_ELEMENTS = 2**12
_CPU = torch.device("cpu")
# Operators whose result is one number throughout, whatever their first input holds, and that number.
_FILLED: dict[Any, Callable[[Any], Any]] = {
    aten.zeros_like.default: lambda args: 0,
    aten.new_zeros.default: lambda args: 0,
    aten.ones_like.default: lambda args: 1,
    aten.new_ones.default: lambda args: 1,
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
}
_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# What `_grouped_mm` aligns the rows of its output to (aten/src/ATen/native/GroupedMMUtils.h).
_GROUPED_ROW_BYTES = 16


class Kernels(Protocol):
    """The kernels of one device, as far as they allocate."""

    def scratch(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
        """Return what an operator takes beside its outputs, or None where that is not modelled."""


class StorageTracer(TorchDispatchMode):
    """Keeps the stream of allocations and frees, who made each block and who used it, and the operators' work.

    kernels: what adds scratch to the stream; None leaves the operators' outputs alone.
    strict: no number that comes from floats may be looked at; else no float while a forward runs.
    refused, refused_in: the first such look, whose error the model's own code may have caught, and its module.
    stop_tokens: token ids that argmax, multinomial and topk never "choose" outside of layers.
    layer, inside: the layer that is running (blocks made now are its own), and whether its forward is.
    journal: who made what, and what layers are handed.
    in_forward: whether the model's is.
    flows: (block, layer) for every block that another layer than its maker has used.
    group_storages, open_groups, borrowed: which weight group (kind of layer, name) a weight is of; the groups whose
        modules are running; those that were used while their own module was not.
    unmodelled: names of operators met whose scratch is not modelled.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        *,
        stop_tokens: Iterable[int] = (),
        kernels: Kernels | None = None,
        expert_storages: Iterable[int] = (),
        routing_seed: int | None = None,
        strict: bool = False,
    ):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.fake = fake
        self.stop_tokens = frozenset(stop_tokens)
        self.safe_token = next(token for token in itertools.count(1) if token not in self.stop_tokens)
        self.kernels = kernels
        self.given: set[int] = set()
        self.expert_storages = set(expert_storages)
        self.events: list[Event] = []
        self.journal = Journal(self.events)
        self.maker: dict[int, int] = {}
        self.flows: set[tuple[int, int]] = set()
        self.layer = -1
        self.inside = self.in_forward = False
        self.strict = strict
        self.refused: TraceError | None = None
        self.refused_in: torch.nn.Module | None = None
        # Storages of real integers that hold what came from floats.
        self._unknown: set[int] = set()
        self.unmodelled: set[str] = set()
        self.flops = self.moved_bytes = self.operators = 0
        self.group_storages: dict[int, tuple[int, str]] = {}
        self.open_groups: set[tuple[int, str]] = set()
        self.borrowed: set[tuple[int, str]] = set()
        self.muted = False
        self.muted_frees: list[int] = []
        self.routing = None if routing_seed is None else torch.Generator().manual_seed(routing_seed)
        self._serial = 0
        self._maker: int | None = CALLER
        self._alive: dict[int, tuple[int, int, Kind]] = {}
        self._kept: set[str] = set()
        self._fills: dict[int, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Modes that watch functions have had their say; here they would only see what the tracer looks at.
        with torch._C.DisableTorchFunction():
            return self._trace(func, args, kwargs or {})

    def _trace(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = tensors_in(args) + tensors_in(kwargs.values())
        lifted = func is aten.lift_fresh.default
        for tensor in inputs:
            self._use(tensor, lifted=lifted)
        any_fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if any_fake:
            out = self._run_fake(func, args, kwargs, inputs)
        elif inputs:
            out = self._run_real(func, args, kwargs, inputs)
        else:
            out = self._run_factory(func, args, kwargs)
        outputs = tensors_in((out,))
        borrowed = [] if self.inside else self._find_maker(func, kwargs, inputs)
        self._record(func, args, kwargs, outputs)
        for entry in borrowed:
            self.journal.give_back(entry)
        self._count_work(func, args, kwargs, inputs, outputs, out)
        return out

    def _find_maker(self, func: Any, kwargs: Any, inputs: list[torch.Tensor]) -> list[Taken]:
        """Note whose the results of an operator between layers are: they are where its first tensor is, or with the
        caller where a device is asked for. Return what must have been brought there from others, for so long.
        """
        makers = [(tensor, self.maker_of(tensor)) for tensor in inputs if tensor.dim()]
        self._maker = makers[0][1] if makers else CALLER
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            self._maker = CALLER
            return []
        others = {id(tensor): (tensor, maker) for tensor, maker in makers if maker != self._maker}
        return [self.journal.borrow(tensor, maker, self._maker) for tensor, maker in others.values()]

    def maker_of(self, tensor: torch.Tensor) -> int | None:
        """Return the layer on whose device a tensor is: the one that made it, or None for the caller's."""
        block = self.block_of(tensor)
        return CALLER if block is None else self.journal.makers.get(block, CALLER)

    def _run_fake(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._look_at(func, inputs[0])
        selected = None
        if func is aten.index.Tensor:
            args = (args[0], self._positions(func, args[1]))
        elif func is aten.masked_select.default and not self._is_unknown(args[1]):
            selected = int(args[1].expand(torch.broadcast_shapes(args[0].shape, args[1].shape)).sum())
        with self.fake:
            if func is aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
                out = _grouped_output(args)
            elif selected is not None:
                out = args[0].new_empty(selected)
            else:
                try:
                    out = func(*args, **kwargs)
                except DynamicOutputShapeException as exc:
                    raise self._refusal(func, "the size of its result depends on data") from exc
                except DataDependentOutputException as exc:
                    raise self._refusal(func, "its result depends on data") from exc
        if func in _FILLED:
            number = _FILLED[func](args)
            return _make_real(out, number) if isinstance(number, (bool, int, float)) else out
        if func._schema.is_mutable:
            written = [at for at, argument in enumerate(func._schema.arguments[: len(args)]) if argument.is_write]
            self._forget(tensors_in([args[at] for at in written]))
            if func._schema.name.endswith("_") and written == [0] and isinstance(args[0], torch.Tensor):
                # A real tensor that is written to stays the one that it is.
                out = args[0]
        if self.strict:
            return out
        if func is aten.topk.default:
            values, indices = out
            return values, self._chosen(args[0], indices)
        token = self.safe_token if func in (aten.argmax.default, aten.multinomial.default) else 0
        if func is aten.gt.Tensor and not self.inside:
            # Running beams beat finished ones, so that a search goes on for as long as it may.
            token = 1
        if func is aten._to_copy.default:
            token = int(self._fills.get(inputs[0].untyped_storage()._cdata, 0))
        if func._schema.is_mutable:
            self._fills.pop(inputs[0].untyped_storage()._cdata, None)
        given = {id(tensor) for tensor in inputs}
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}

        def as_known(tensor: torch.Tensor) -> torch.Tensor:
            is_given = id(tensor) in given or tensor.untyped_storage()._cdata in storages
            return tensor if is_given else _make_real(tensor, token)

        return _map_tensors(out, as_known)

    def _look_at(self, func: Any, tensor: torch.Tensor) -> bool | int | float:
        """Return the number in a fake tensor of one element, where it is known or may be made up."""
        is_float = tensor.dtype.is_floating_point
        fill = self._fills.get(tensor.untyped_storage()._cdata)
        if fill is not None:
            return fill if is_float else int(fill)
        if self.strict or (is_float and (self.inside or self.in_forward)):
            raise self._refusal(func, f"the model looks at a number of {tensor.dtype} that depends on data")
        return 0.0 if is_float else 0

    def _refusal(self, func: Any, why: str) -> TraceError:
        error = TraceError(f"{func}: {why}, and a trace has none")
        if self.refused is None:
            owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_stack(None))
            self.refused, self.refused_in = error, next((o for o in owners if isinstance(o, torch.nn.Module)), None)
        return error

    def _forget(self, tensors: list[torch.Tensor]) -> None:
        """Note that the real ones among `tensors` hold what came from floats."""
        for tensor in tensors if self.strict else ():
            storage = tensor.untyped_storage()
            if not isinstance(tensor, FakeTensor) and storage._cdata not in self._unknown:
                self._unknown.add(storage._cdata)
                weakref.finalize(storage, self._unknown.discard, storage._cdata)

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor) or tensor.untyped_storage()._cdata in self._unknown

    def _positions(self, func: Any, indices: Any) -> list[Any]:
        """Return indices with the known masks among them as the positions that they select."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            elif self._is_unknown(index):
                raise self._refusal(func, "the size of its result depends on data")
            else:
                found += index.nonzero().unbind(1)
        return found

    def _chosen(self, scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return what topk "chooses": in a layer the first experts for every token, or a draw; else safe tokens."""
        k, among = indices.shape[-1], scores.shape[-1]
        if not self.inside:
            safe = (token for token in itertools.count(self.safe_token) if token not in self.stop_tokens)
            chosen = torch.tensor([token if among > token else 0 for token in itertools.islice(safe, k)])
        elif self.routing is None or len(indices.shape) != 2:
            chosen = torch.arange(k)
        else:
            return torch.rand(*indices.shape[:-1], among, generator=self.routing).argsort(-1)[..., :k].contiguous()
        return chosen.expand(indices.shape).contiguous()

    def _run_real(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        if self._unknown and any(self._is_unknown(tensor) for tensor in inputs):
            if func is aten.index.Tensor:
                self._positions(func, args[1])
            elif any(tag in func.tags for tag in _LOOKS):
                raise self._refusal(func, "its result depends on data")
            out = func(*args, **kwargs)
            self._forget(tensors_in((out,)))
            return out
        if max(tensor.numel() for tensor in inputs) > _LARGE_INPUT_ELEMENTS and not func._schema.is_mutable:
            with self.fake:
                try:
                    shapes = tensors_in((func(*args, **kwargs),))
                except DynamicOutputShapeException:
                    shapes = []
            if shapes and max(tensor.numel() for tensor in shapes) > LARGEST_REAL_ELEMENTS:
                with self.fake:
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _run_factory(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            out = func(*args, **kwargs)
        tensors = tensors_in((out,))
        small_integer = all(
            not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST_REAL_ELEMENTS for tensor in tensors
        )
        if not small_integer and func in (aten.ones.default, aten.full.default) and len(tensors) == 1:
            # A mask may be made as floats of one value and then turned into booleans, which are looked at.
            fill = 1.0 if func is aten.ones.default else args[1]
            key = tensors[0].untyped_storage()._cdata
            if isinstance(fill, (bool, int, float)) and math.isfinite(fill):
                self._fills[key] = float(fill)
                weakref.finalize(tensors[0].untyped_storage(), self._fills.pop, key, None)
        return func(*args, **kwargs) if small_integer else out

    def _record(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        scratch: Scratch | None = OUTPUTS_ONLY
        if self.kernels is not None:
            scratch = self.kernels.scratch(func, args, kwargs, outputs)
        if scratch is OUTPUTS_ONLY:
            for tensor in outputs:
                self._follow(tensor)
            return
        if scratch is None:
            self.unmodelled.add(str(func))
            scratch = OUTPUTS_ONLY
        for name, nbytes in scratch.keeps:
            if name not in self._kept:
                self._kept.add(name)
                self._emit(self._next(), nbytes, "library")
        taken: list[tuple[int, int] | None] = []
        for step in scratch.program:
            if step == 0:
                for tensor in outputs:
                    self._follow(tensor)
            elif step > 0:
                block = self._next()
                taken.append((block, step))
                self._emit(block, step, "scratch")
            else:
                self._give_back(taken, -step - 1)
        for index in reversed(range(len(taken))):
            self._give_back(taken, index)

    def _give_back(self, taken: list[tuple[int, int] | None], index: int) -> None:
        entry = taken[index]
        if entry is not None:
            self._emit(entry[0], -entry[1], "scratch")
            taken[index] = None

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _emit(self, block: int, nbytes: int, kind: Kind) -> None:
        if not self.muted:
            self.events.append(Event(block, nbytes, kind))

    def _follow(self, tensor: torch.Tensor, kind: Kind = "activations") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self.given:
            return
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        block = self._next()
        self._alive[key] = (block, nbytes, kind)
        self.maker[block] = self.layer
        if kind != "scratch":
            self.journal.makers[block] = self.layer if self.inside else self._maker
        elif not self.in_forward:
            # The caller's numbers (tokens of start, end and padding) are tensors on its device.
            self.journal.makers[block] = CALLER
        self._emit(block, nbytes, kind)
        weakref.finalize(storage, self._freed, key)

    def _use(self, tensor: torch.Tensor, *, lifted: bool) -> None:
        """Note who uses a storage. One that was there before is the caller's own, and never counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._alive.get(key)
        if entry is not None:
            if self.maker[entry[0]] != self.layer:
                self.flows.add((entry[0], self.layer))
        elif key in self.given:
            group = self.group_storages.get(key)
            if group is not None and group not in self.open_groups:
                self.borrowed.add(group)
        else:
            if lifted:
                self._follow(tensor, "scratch")
                return
            self.given.add(key)
            weakref.finalize(storage, self.given.discard, key)

    def _freed(self, key: int) -> None:
        block, nbytes, kind = self._alive.pop(key)
        if self.muted:
            self.muted_frees.append(block)
        else:
            self.events.append(Event(block, -nbytes, kind))

    def stand_in(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a fresh fake tensor of the layer that is running, as an operator would have made it."""
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            result: torch.Tensor = FakeTensor(self.fake, meta, _CPU)
        self._follow(result)
        return result

    def block_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the block that a tensor lies in, None for weights and the caller's own."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[0]

    def fresh_block(self) -> int:
        """Return a number for a block that a replay makes; it belongs to the layer that is running."""
        block = self._next()
        self.maker[block] = self.journal.makers[block] = self.layer
        return block

    def _count_work(
        self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], out: Any
    ) -> None:
        if not outputs or (_is_view(inputs, outputs) and not func._schema.is_mutable):
            return
        made = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        self.operators += 1
        self.flops += _flops(func, args, kwargs, out)
        if func in (aten.embedding.default, aten.index.Tensor, aten.index_select.default):
            self.moved_bytes += 2 * made
            return
        read = sum(
            tensor.numel() * tensor.element_size()
            for tensor in inputs
            if tensor.untyped_storage()._cdata not in self.expert_storages
        )
        self.moved_bytes += read + (0 if func._schema.is_mutable else made)


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors among `values`, inside lists and tuples too, in order."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _make_real(tensor: torch.Tensor, fill: int | float) -> torch.Tensor:
    is_number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    if is_number or not isinstance(tensor, FakeTensor) or tensor.numel() > LARGEST_REAL_ELEMENTS:
        return tensor
    return torch.full(tensor.shape, fill, dtype=tensor.dtype)


def _grouped_output(args: Any) -> torch.Tensor:
    """Return an output of `_grouped_mm` (rows by groups of columns) in a dtype that torch's meta kernel refuses."""
    left, right = args[0], args[1]
    rows, columns = left.shape[-2], right.shape[-1]
    per_row = _GROUPED_ROW_BYTES // left.element_size()
    stride = -(-columns // per_row) * per_row
    shape: tuple[int, ...] = (rows, columns)
    strides: tuple[int, ...] = (stride, 1)
    if left.dim() == right.dim():
        groups = args[2].shape[0] if left.dim() == 2 else left.shape[0]
        shape, strides = (groups, *shape), (rows * stride, *strides)
    out: torch.Tensor = left.new_empty_strided(shape, strides)
    return out


def _is_view(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the FLOPs of one operator: torch's own formulas, and for grouped matmul 2·rows·inner·columns."""
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    if packet is aten._grouped_mm:
        rows, columns = out.shape[-2], out.shape[-1]
        return int(2 * rows * args[0].shape[-1] * columns)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = args[:3]
        batch, heads, tokens, width = query.shape
        return int(2 * batch * heads * tokens * key.shape[-2] * (width + value.shape[-1]))
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
