"""What users call: a model and a machine → a Plan, scored by the simulator.

Heavy packages are imported where they are first needed: a cached answer needs neither torch nor ortools. The
simulator is imported from here, the one place where the planner reaches up.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planner import cache, loading, memory
from planner.errors import InputError, PlanFormatError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.headers import Headers, find_headers
from planner.models import ModelSource, load_config, resolve_model
from planner.plan import SCHEMA_VERSION, Execution, ModelInfo, Placement, Plan, Prediction
from planner.serial import decode, encode
from planner.workload import DEFAULT_NEW_TOKENS, DEFAULT_PROMPT_TOKENS, Workload

if TYPE_CHECKING:
    import torch

Report = Callable[[str], None]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def plan_model(
    model: Any,
    *,
    gpus: str | int | None = None,
    ram: str | int | None = None,
    disk: str | int | None = None,
    batch_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    weight_dtype: str | None = None,
    max_memory: Mapping[str, str | int] | None = None,
    hardware: Hardware | None = None,
    workload: Workload | None = None,
    hub: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_cache: bool = True,
    report: Report = lambda text: None,
) -> Plan:
    """Return the best plan for `model` (a name or folder, a transformers config, or a model) on a machine.

    The machine is `hardware`, or is described by `gpus`, `ram`, `disk` and `max_memory`; the work is `workload`, or is
    described by `batch_size`, `prompt_tokens` and `new_tokens`. `report` is told what is being done.

    Raises:
        InputError: an argument cannot be used. TraceError: the model is of a kind not carried yet.
        InfeasibleError: nothing fits. NoSolutionInTimeError: the search was cut off.
    """
    notes: list[str] = []
    if workload is None:
        workload = _workload(batch_size, prompt_tokens, new_tokens, notes)
    elif (batch_size, prompt_tokens, new_tokens) != (None, None, None):
        raise InputError("give a workload, or batch_size, prompt_tokens and new_tokens, not both")
    if hardware is None:
        hardware = Hardware.from_options(gpus, ram=ram, disk=disk, max_memory=max_memory)
    elif max_memory:
        hardware = hardware.with_max_memory(max_memory)
    source, module = _source(model, hub=hub, revision=revision, trust_remote_code=trust_remote_code)
    stored = None
    if source.source in ("local", "hub"):
        on_hub = source.source == "hub"
        stored = find_headers(folder=source.folder, hub=on_hub, name=source.id, revision=source.revision, notes=notes)
    dtype = _dtype(weight_dtype, source, module, stored, notes)
    question = {
        "model": [source.id, source.source, source.revision, source.config_digest],
        "hardware": hardware,
        "workload": workload,
        "dtype": dtype,
        "notes": notes,
        "stored": stored and stored.digest(),
    }
    name = cache.key("plan", question)
    cacheable = use_cache and module is None
    if cacheable and (kept := _kept_plan(name)) is not None:
        return kept
    tracer = _Tracer(source, module, workload, dtype, trust_remote_code, use_cache=cacheable, report=report)
    tracer.headers = stored
    with _collector_paused():
        plan = _best(tracer, hardware, workload, source, dtype, notes, report)
    if cacheable:
        cache.write(name, plan.to_json())
    return plan


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Import, build and trace without the cyclic collector: it costs a sixth of the time, and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _best(
    tracer: _Tracer,
    hardware: Hardware,
    workload: Workload,
    source: ModelSource,
    dtype: str,
    notes: list[str],
    report: Report,
) -> Plan:
    from planner.placement.solution import find

    fits_whole = tracer.weight_bytes() <= sum(pool.usable_bytes for pool in hardware.pools if pool.name != "disk")
    may_group = dtype == "bfloat16" and fits_whole
    graph, execution = tracer.trace(routed=not may_group)
    report("placing")
    placements, slots, solver = find(graph, hardware, workload)
    # The name is planner.execution.GROUPED_EXPERTS, whose module would load torch on a path that has the trace cached.
    if execution.experts == "loadplan_grouped" and not _experts_stay(placements):
        # Grouped matmul needs every expert where it computes; the best placement streams some, so run them by route.
        report("tracing routed experts")
        graph, execution = tracer.trace(routed=True)
        placements, slots, solver = find(graph, hardware, workload)
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id=source.id,
            source=source.source,
            note=source.note,
            revision=source.revision,
            config_digest=source.config_digest,
            weight_dtype=dtype,
            num_parameters=graph.num_parameters,
            weight_bytes=graph.weight_bytes,
            versions=cache.versions(),
            loaded=tracer.loaded,
            stored_bytes=None if tracer.headers is None else tracer.headers.total_bytes,
        ),
        graph=graph,
        hardware=hardware,
        workload=workload,
        execution=execution,
        assumptions=(*notes, *tracer.notes, *_execution_notes(workload, execution), *hardware.assumptions),
        placements=placements,
        slots=slots,
        prediction=None,
        solver=solver,
    )
    report("simulating")
    shortage = loading.shortage(plan)
    assumptions = plan.assumptions if shortage is None else (*plan.assumptions, shortage)
    return _replace(plan, assumptions=assumptions, prediction=predict(plan))


def _experts_stay(placements: Sequence[Placement]) -> bool:
    return all(p.home == p.run_on for p in placements if p.resident_slices is not None)


def predict(plan: Plan) -> Prediction:
    """Return what the plan will take: memory from its placement, time from the simulator."""
    simulate = importlib.import_module("simulate")
    timeline = simulate.run(plan)
    peaks = memory.peak(plan.graph, plan.hardware, plan.placements, plan.slots)
    outputs = memory.operator_outputs(plan.graph, plan.placements)
    decode_ns = timeline.decode_ns_per_token
    per_token = decode_ns or timeline.prefill_ns
    disk = plan.hardware.link("disk", "cpu")
    return Prediction(
        peak_bytes={name: usage.total for name, usage in sorted(peaks.items())},
        peak_breakdown={name: usage.by_kind() for name, usage in sorted(peaks.items())},
        counters={name: {"operator_outputs": nbytes} for name, nbytes in sorted(outputs.items())},
        prefill_ns=timeline.prefill_ns,
        decode_ns_per_token=decode_ns,
        total_ns=timeline.total_ns,
        tokens_per_s=round(plan.workload.batch_size * 1e9 / per_token, 3) if per_token else 0.0,
        load_ns=loading.read_bytes(plan) * 10**9 // disk.bytes_per_s,
        load_peak_bytes=loading.load_peak_bytes(plan),
    )


class _Tracer:
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
    ):
        self.source, self.module, self.workload, self.dtype = source, module, workload, dtype
        self.trust_remote_code, self.use_cache, self.report = trust_remote_code, use_cache, report
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
        parts = {"config": self.source.config_digest, "workload": self.workload, "dtype": self.dtype, "routed": routed}
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
        from planner.trace import check_carried, trace

        check_carried(model)
        experts = None
        if implementations.experts_modules(model):
            experts = implementations.ROUTED_EXPERTS if routed else implementations.GROUPED_EXPERTS
        graph = trace(model, self.workload, experts=experts)
        return graph, Execution(attention=str(model.config._attn_implementation), experts=experts)


def build_on_meta(source: ModelSource, dtype: str, *, trust_remote_code: bool = False) -> torch.nn.Module:
    """Return the causal language model that a config describes, without memory for its weights.

    Raises:
        TraceError: the config is not of a decoder-only language model that transformers knows.
    """
    import torch

    from planner.errors import TraceError

    config = load_config(source, trust_remote_code=trust_remote_code)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = (getattr(config, "architectures", None) or [None])[0]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = known if isinstance(known, (list, tuple)) else [known]
    if known is None or (wanted is not None and wanted not in names and not trust_remote_code):
        raise TraceError(
            f"{source.id} is a {wanted or config.model_type}: only decoder-only language models are carried yet"
        )
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    return model


def describe(model: Any) -> ModelSource:
    """Return where a name, folder or config comes from, without loading anything heavy."""
    return _source(model, hub=False, revision=None, trust_remote_code=False)[0]


def _source(model: Any, *, hub: bool, revision: str | None, trust_remote_code: bool) -> tuple[ModelSource, Any]:
    """Return where the model comes from, and the model itself if it was given as one."""
    if isinstance(model, str):
        return resolve_model(model, hub=hub, revision=revision, trust_remote_code=trust_remote_code), None
    if hasattr(model, "to_diff_dict") and hasattr(model, "model_type"):
        return _from_config(model), None
    if hasattr(model, "named_parameters"):
        config = getattr(model, "config", None)
        note = f"the {type(model).__name__} given"
        if config is not None and hasattr(config, "to_diff_dict"):
            described = _from_config(config)
            return _as_module(described, note), model
        return ModelSource(id=type(model).__name__, source="module", revision=None, config={}, config_digest="",
                           folder=None, note=note), model  # fmt: skip
    raise InputError(f"a model is a name, a folder, a transformers config or a module, not {type(model).__name__}")


def _from_config(config: Any) -> ModelSource:
    data = json.loads(config.to_json_string(use_diff=True))
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    name = config.name_or_path or type(config).__name__
    return ModelSource(
        id=name, source="config", revision=None, config=data, config_digest=digest, folder=None, note="the config given"
    )


def _as_module(source: ModelSource, note: str) -> ModelSource:
    return ModelSource(
        id=source.id,
        source="module",
        revision=None,
        config=source.config,
        config_digest=source.config_digest,
        folder=None,
        note=note,
    )


def _workload(batch: int | None, prompt: int | None, new: int | None, notes: list[str]) -> Workload:
    if prompt is None:
        notes.append(f"a prompt of {DEFAULT_PROMPT_TOKENS} tokens (assumed)")
    if new is None:
        notes.append(f"{DEFAULT_NEW_TOKENS} new tokens (assumed)")
    if batch is None:
        notes.append("a batch of 1 (assumed)")
    return Workload(
        batch_size=1 if batch is None else batch,
        prompt_tokens=DEFAULT_PROMPT_TOKENS if prompt is None else prompt,
        new_tokens=DEFAULT_NEW_TOKENS if new is None else new,
    )


def _dtype(wanted: str | None, source: ModelSource, module: Any, stored: Headers | None, notes: list[str]) -> str:
    """Return what the weights run in: as the caller says, else as most of the checkpoint is stored, else as the
    config says.
    """
    if module is not None:
        own = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
        if wanted is not None and own != {DTYPES.get(wanted, wanted)}:
            raise InputError(f"the model has weights of {', '.join(sorted(own))}; convert it, or leave the dtype out")
        return max(sorted(own)) if own else "float32"
    if wanted is None:
        stated = source.config.get("dtype") or source.config.get("torch_dtype")
        text = source.config.get("text_config")
        if stated is None and isinstance(text, dict):
            stated = text.get("dtype") or text.get("torch_dtype")
        configured = str(stated).removeprefix("torch.") if stated else None
        in_files = stored.float_dtype() if stored is not None else None
        name = in_files or configured or "bfloat16"
        why = "as the checkpoint stores them" if in_files else "as the config says" if stated else "assumed"
        if in_files and configured and configured != in_files:
            why += f"; its config says {configured}"
        notes.append(f"weights in {name} ({why})")
    else:
        name = DTYPES.get(wanted, wanted)
    quantised = source.config.get("quantization_config")
    if stored is None and isinstance(quantised, dict):
        notes.append(
            f"the published weights are quantised ({quantised.get('quant_method', 'it is not said how')}): the plan is "
            f"for weights in {name}, and quantised ones are not carried yet"
        )
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"weights in {name} are not carried yet; choose bfloat16, float16 or float32")
    return name


def _execution_notes(workload: Workload, execution: Execution) -> list[str]:
    choice = "greedy decoding (assumed)" if workload.sampling == "greedy" else "sampling"
    notes = [f"{execution.attention} attention, dynamic cache, {choice}; prompts of equal length"]
    if execution.experts is not None:
        notes.append(
            f"experts run as {execution.experts}: memory counts the worst routing, time the expected number of "
            "distinct experts, each equally popular (assumed)"
        )
    notes.append("activations as the CPU's fused operators make them; kernels' own scratch is not counted")
    return notes


def _kept_plan(name: str) -> Plan | None:
    text = cache.read(name)
    if text is None:
        return None
    try:
        return Plan.from_json(text)
    except PlanFormatError:
        return None


def _replace(plan: Plan, **changes: Any) -> Plan:
    return Plan(**{**{name: getattr(plan, name) for name in plan.__slots__}, **changes})
