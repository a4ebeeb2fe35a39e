"""Traces one model for one workload and one kind of device, or finds the graph in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner import cache
from planner.errors import PlanFormatError, TraceError
from planner.given import build_on_meta
from planner.graph import LayerGraph
from planner.hardware import Hardware, products
from planner.host_cache import on_host
from planner.models import ModelSource
from planner.plan import Execution
from planner.serial import decode, encode
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.headers import Headers
    from planner.trace import Tracing

Report = Callable[[str], None]
# Events of the workload that are replayed by the allocator's model while planning.
_REPLAYED_EVENTS = 60_000
# The CPU whose kernels are modelled where no machine is at hand.
ASSUMED_CPU = {"threads": 8, "isa": "AVX2"}


class Tracer:
    """Traces one model for one workload, or finds the graph in the cache. The model is built once, on meta."""

    def __init__(
        self,
        source: ModelSource,
        module: Any,
        workload: Workload,
        dtype: str,
        trust_remote_code: bool,
        *,
        use_cache: bool,
        report: Report,
        hardware: Hardware,
        examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
    ):
        self.source, self.module, self.workload, self.dtype = source, module, workload, dtype
        self.trust_remote_code, self.use_cache, self.report = trust_remote_code, use_cache, report
        self.examples = examples
        self.gpu = next((_product_key(device.product) for device in hardware.gpus), "") if hardware.gpus else None
        self.headers: Headers | None = None
        self.notes: tuple[str, ...] = ()
        self.loaded = module is not None and not any(parameter.is_meta for parameter in module.parameters())

    def weight_bytes(self) -> int:
        """Return the bytes of the model's weights, ties once."""
        name = cache.key("weights", {"config": self.source.config_digest, "dtype": self.dtype})
        kept = cache.read(name) if self.use_cache else None
        if kept is not None and kept.isdigit():
            return int(kept)
        total: int = sum(p.numel() * p.element_size() for p in self.built().parameters())
        if self.use_cache:
            cache.write(name, str(total))
        return total

    def built(self) -> Any:
        """Return the model, built on meta where it was not given."""
        if self.module is None:
            self.report("building the model on meta")
            self.module = build_on_meta(self.source, self.dtype, trust_remote_code=self.trust_remote_code)
        return self.module

    def trace(self, *, routed: bool) -> tuple[LayerGraph, Execution]:
        """Return the graph, with what the checkpoint's headers say of each tensor where they were read."""
        graph, execution = self._kept_or_traced(routed=routed)
        if self.headers is None:
            return graph, execution
        from planner.stored import compare, with_stored

        comparison = compare(self.built(), self.headers, self.dtype)
        self.notes = comparison.notes
        return with_stored(graph, comparison.stored), execution

    def _kept_or_traced(self, *, routed: bool) -> tuple[LayerGraph, Execution]:
        parts = {
            "config": self.source.config_digest,
            "workload": self.workload,
            "dtype": self.dtype,
            "routed": routed,
            "gpu": self.gpu,
        }
        name = cache.key("graph", parts)
        kept = cache.read(name) if self.use_cache else None
        if kept is not None:
            try:
                data = json.loads(kept)
                return LayerGraph.from_dict(data["graph"]), decode(Execution, data["execution"], where="execution")
            except (json.JSONDecodeError, KeyError, TypeError, PlanFormatError):
                pass
        graph, execution = self._trace(routed=routed)
        if self.use_cache:
            cache.write(name, json.dumps({"graph": encode(graph), "execution": encode(execution)}))
        return graph, execution

    def _trace(self, *, routed: bool) -> tuple[LayerGraph, Execution]:
        model = self.built()
        self.report("tracing")
        from planner import execution as implementations

        experts = None
        if implementations.experts_modules(model):
            experts = implementations.ROUTED_EXPERTS if routed else implementations.GROUPED_EXPERTS
        offloads = self.workload.cache == "offloaded" and self.workload.caller == "generate"
        work = replace(self.workload, cache="dynamic") if offloads else self.workload
        tracing = tracing_for(model, work, gpu=self.gpu, experts=experts, examples=self.examples)
        if offloads and tracing.inputs.generates:
            graph = self._on_host(tracing)
        else:
            extra = allocator_bytes(tracing) if self.gpu is not None else 0
            graph = tracing.graph(allocator_bytes=extra, by_maker=self.gpu is not None)
        return graph, Execution(
            attention=attention_of(model), experts=experts, unmodelled=tuple(sorted(tracing.first.unmodelled))
        )

    def _on_host(self, tracing: Tracing) -> LayerGraph:
        """Return the graph with its cache in host memory.

        The allocator keeps what it does without a cache, and twice what is in transit of one layer: sizes that a
        growing cache went through are not used again.
        """
        from planner.inputs import check_on_host

        check_on_host(self.module)
        if self.gpu is None:
            raise TraceError("the offloaded cache moves keys and values from GPUs to the host, and there is no GPU")
        graph = tracing.graph()
        largest = max((span.kv_after_bytes for entry in graph.passes for span in entry.spans), default=0)
        extra = allocator_bytes(tracing, with_cache=False) + 2 * largest
        return replace(on_host(graph), allocator_bytes=extra)


def tracing_for(
    model: Any,
    workload: Workload,
    *,
    gpu: str | None,
    experts: str | None = None,
    examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
    kernels: Any = None,
    routing_seed: int | None = None,
) -> Tracing:
    """Return a tracing of `model` as a GPU would run it (a product's key, "" for an unknown one), or the CPU (None).

    kernels: of the CPU; the assumed one's where None.
    """
    from planner.trace import Tracing

    attention = None
    if gpu is not None:
        from planner.kernels.cuda import CudaKernels
        from planner.kernels.cuda_attention import CudaAttention

        kernels = CudaKernels.of_product(gpu or None)
        attention = CudaAttention(kernels)
    elif kernels is None:
        from planner.kernels.cpu import CpuKernels

        kernels = CpuKernels(**ASSUMED_CPU)  # type: ignore[arg-type]
    return Tracing(
        model, workload, examples=examples, experts=experts, kernels=kernels, attention=attention,
        routing_seed=routing_seed,
    )  # fmt: skip


def allocator_bytes(tracing: Tracing, *, with_cache: bool = True) -> int:
    """Return what the caching allocator reserves beyond what is requested of it, at their greatest, without weights."""
    from planner.cuda_allocator import replay
    from planner.footprint import stream

    events = [event for _, part in stream(tracing, most_events=_REPLAYED_EVENTS) for event in part]
    if not with_cache:
        events = [event for event in events if event.kind != "kv_cache"]
    counters = replay(events)
    return counters.peak_reserved_bytes - counters.peak_requested_bytes


def attention_of(model: Any) -> str | None:
    """Return the attention implementation that a model of transformers is set to."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return None if name is None else str(name)


def _product_key(name: str) -> str:
    table = products()["products"]
    return next((key for key, facts in table.items() if facts["name"] == name), "")
