"""What a run really took, to be held beside what the plan said. Nothing that predicts is imported here."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from dispatch.calls import Call, call_of
from planner.errors import InputError
from planner.execution import experts_modules
from planner.measurement import Measurement, PhaseTimes
from planner.plan import Plan

NAMES_ATTRIBUTE = "_loadplan_names"


@dataclass(frozen=True, slots=True)
class PlanNames:
    """What a dispatched model's plan calls things; `dispatch.apply` leaves it as NAMES_ATTRIBUTE.

    devices: that play one device of the plan each. layers: in which each module of fused experts is, by their paths.
    """

    devices: Mapping[torch.device, str]
    layers: Mapping[str, str]


class Meter(Protocol):
    """Counts what is held on devices of its own, such as a virtual machine."""

    @property
    def devices(self) -> Mapping[str, torch.device]:
        """The devices, by the names that plans have for them."""

    def reset_peaks(self) -> None:
        """Let every peak begin again at what is held now."""

    def peak_bytes(self, name: str) -> int:
        """Return the most bytes held on a device at once."""


def plan_names(plan: Plan, targets: Mapping[str, torch.device]) -> PlanNames:
    """Return what a plan calls things whose devices are played by `targets`."""
    played = list(targets.values())
    return PlanNames(
        devices={device: name for name, device in targets.items() if played.count(device) == 1},
        layers={f"{p.layer}.{p.group}": p.layer for p in plan.placements if p.resident_slices is not None},
    )


def measure(
    model: torch.nn.Module,
    *,
    memory: bool | None = None,
    routing: bool = True,
    meter: Meter | None = None,
    clock: Callable[[], int] | None = None,
) -> Recording:
    """Return what records, as a context, what a model takes while the user's own code runs:

        with dispatch.measure(model) as run:
            model.generate(...)
        print(plan.check(run.measurement))

    model: any module, dispatched or not; its own calls are timed by torch's hooks, and nothing of it is changed.
    memory: follow every storage that operators make, operator by operator. That is exact on the CPU, and slows; by
        default it is done for models that have a device that is not CUDA's, whose allocator counts by itself.
    routing: count which experts tokens are routed to (of fused experts).
    meter: what counts the bytes of devices that torch does not, such as `simulate.virtual("2x24GB")`.
    clock: returns the instant when all is done, in ns, such as that machine's `synchronize`; by default the host's
        clock, after waiting for what the model's GPUs were given on their current streams.

    A prefill is the pass over a prompt, in one call or several chunks; other calls are decode steps. Calls that raise
    count in neither. What runs on other streams (weights on their way for the next pass) is not waited for. Of models
    with an encoder, only the decoder's passes are timed.

    Raises:
        InputError: `model` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            "dispatch.measure takes the model, `with dispatch.measure(model) as run:`, and not "
            f"{type(model).__name__}; call the model inside of it"
        )
    return Recording(model, memory=memory, routing=routing, meter=meter, clock=clock)


class Recording:
    """One stretch of measuring, made by `measure`. `measurement` is there when it has ended."""

    measurement: Measurement

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        memory: bool | None,
        routing: bool,
        meter: Meter | None,
        clock: Callable[[], int] | None,
    ):
        self.model, self._routing, self._meter = model, routing, meter
        self._names = getattr(model, NAMES_ATTRIBUTE, None) or PlanNames({}, {})
        devices = {*self._names.devices, *(tensor.device for tensor in model.parameters())} - {torch.device("meta")}
        self._gpus = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._clock = clock or self._host_clock
        if memory is None:
            memory = meter is None and len(self._gpus) < len(devices)
        self._storages = _StorageMeter() if memory else None
        self._calls: list[tuple[Call, int]] = []
        self._open: dict[int, tuple[Call, int]] = {}
        self._routed: dict[str, list[int]] = {}
        self._undo = contextlib.ExitStack()
        self._started = 0

    def __enter__(self) -> Recording:
        undo = self._undo
        undo.callback(self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
        undo.callback(self.model.register_forward_hook(self._after).remove)
        for path, module in experts_modules(self.model).items() if self._routing else ():
            layer = self._names.layers.get(path) or layer_of(path)
            hook = module.register_forward_pre_hook(self._router(layer, int(module.num_experts)), with_kwargs=True)  # type: ignore[arg-type]  # a module's attributes are untyped
            undo.callback(hook.remove)
        if self._meter is not None:
            self._meter.reset_peaks()
        for device in self._gpus:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._started = self._clock()
        if self._storages is not None:
            self._storages.__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._storages is not None:
            self._storages.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's own
        self._undo.close()
        total = self._clock() - self._started
        prefill, decode = _phases(self._calls)
        calls = [call for call, _ in self._calls]
        self.measurement = Measurement(
            model=type(self.model).__name__,
            counters=self._counters(),
            prefill=PhaseTimes.of([taken for taken, _ in prefill]),
            decode=PhaseTimes.of(decode),
            total_ns=total,
            metered=self._storages is not None,
            rows=max((call.rows for call in calls), default=0),
            prompt_tokens=max((tokens for _, tokens in prefill), default=0),
            context_tokens=max((call.context_tokens for call in calls), default=0),
            routed={layer: tuple(counts) for layer, counts in sorted(self._routed.items())},
        )

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _disable_current_modes():
            self._open[threading.get_ident()] = call_of(args, kwargs), self._clock()

    def _after(self, module: Any, args: Any, out: Any) -> None:
        call, started = self._open.pop(threading.get_ident())
        self._calls.append((call, self._clock() - started))

    def _router(self, layer: str, experts: int) -> Callable[..., None]:
        tally = self._routed.setdefault(layer, [0] * experts)

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if not isinstance(index, torch.Tensor):
                return
            # What is counted here is no part of what is measured.
            with _disable_current_modes():
                for expert in index.detach().to("cpu").flatten().tolist():
                    if 0 <= expert < experts:
                        tally[expert] += 1

        return count

    def _host_clock(self) -> int:
        for device in self._gpus:
            torch.cuda.current_stream(device).synchronize()
        return time.perf_counter_ns()

    def _counters(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for device, nbytes in self._storages.peak.items() if self._storages is not None else ():
            found.setdefault(self._name(device), {})["operator_outputs"] = nbytes
        for name in self._meter.devices if self._meter is not None else ():
            found.setdefault(name, {})["tensors"] = self._meter.peak_bytes(name)  # type: ignore[union-attr]
        for device in self._gpus:
            reserved = int(torch.cuda.max_memory_reserved(device))
            free, whole = torch.cuda.mem_get_info(device)
            beside = whole - free - int(torch.cuda.memory_reserved(device))
            found.setdefault(self._name(device), {}).update(reserved=reserved, device_used=beside + reserved)
        return found

    def _name(self, device: torch.device) -> str:
        return self._names.devices.get(device, str(device))


def layer_of(path: str) -> str:
    """Return the layer that a module is in by its path: what ends in a number, "model.layers.3" of
    "model.layers.3.mlp.experts"; the path itself where nothing does.
    """
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else path


def _phases(calls: Iterable[tuple[Call, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Return (ns, tokens) of each prefill, its chunks together, and the ns of each decode step."""
    prefill: list[tuple[int, int]] = []
    decode: list[int] = []
    in_prefill = False
    for call, taken in calls:
        if call.past_tokens == 0:
            in_prefill = True
            prefill.append((taken, call.new_tokens))
        elif in_prefill and call.new_tokens > 1:
            prefill[-1] = prefill[-1][0] + taken, prefill[-1][1] + call.new_tokens
        else:
            in_prefill = False
            decode.append(taken)
    return prefill, decode


class _StorageMeter(TorchDispatchMode):
    """Follows every storage that an operator returns and that none took, until it is freed. Scratch that kernels take
    and give back inside one operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.live: dict[torch.device, int] = {}
        self.peak: dict[torch.device, int] = {}
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self._meet(value, 0)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._meet(value, value.untyped_storage().nbytes())
        return out

    def _meet(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        device = tensor.device
        self._known[key] = nbytes
        weakref.finalize(storage, self._forget, key, device)
        if nbytes:
            self.live[device] = self.live.get(device, 0) + nbytes
            self.peak[device] = max(self.peak.get(device, 0), self.live[device])

    def _forget(self, key: int, device: torch.device) -> None:
        nbytes = self._known.pop(key)
        if nbytes:
            self.live[device] -= nbytes
