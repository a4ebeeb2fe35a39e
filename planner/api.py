"""What users call: a model and a machine → a Plan, scored by the simulator.

Heavy packages are imported where they are first needed: a cached answer needs neither torch nor ortools. The
simulator is imported from here, the one place where the planner reaches up.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner import cache, loading, memory, search
from planner.chunks import chunks
from planner.cost import weight_dtype
from planner.device_map import MAPPED, DeviceMap, placed
from planner.errors import InfeasibleError, InputError, PlanFormatError
from planner.fixes import GraphQuestion, with_fixes
from planner.given import build_on_meta, dtype_of, source_of
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.headers import find_headers
from planner.plan import SCHEMA_VERSION, Execution, ModelInfo, Placement, Plan, Prediction, Slots, Solver
from planner.popularity import Popularity
from planner.products import product
from planner.question import Question
from planner.rules import NO_RULES, Rules
from planner.tracer import Report, attention_of, tracing_for
from planner.workload import DEFAULT_NEW_TOKENS, DEFAULT_PROMPT_TOKENS, Workload

if TYPE_CHECKING:
    from planner.footprint import MemoryPrediction

# Routings drawn for an expected value.
_DRAWN_ROUTINGS = 4
# Objectives that choose the size of the work; what is given of it is the least.
_SIZED = ("throughput", "max-batch", "max-context")
PopularityGiven = str | Path | Mapping[str, Sequence[float]] | Popularity | None


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
    rules: Rules = NO_RULES,
    popularity: PopularityGiven = None,
    hub: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_cache: bool = True,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    report: Report = lambda text: None,
    **more_work: Any,
) -> Plan:
    """Return the best plan for `model` (a name or folder, a transformers config, or a model) on a machine.

    The machine is `hardware`, or is described by `gpus`, `ram`, `disk` and `max_memory`; the work is `workload`, or is
    described by `batch_size`, `prompt_tokens`, `new_tokens` and other fields of a Workload; `rules` are constraints and
    choices beyond the capacities. With the objectives "throughput", "max-batch" and "max-context" the batch or the
    prompt is searched for, from the one given upwards. `popularity` says how often each expert of each layer was routed
    to (a file, or {layer: counts}; docs/popularity.md); all are alike where it is left out. `example_inputs` are what
    the model is traced with, which modules that are not of transformers need. `report` is told what is being done.

    Raises:
        InputError: an argument cannot be used. TraceError: the model is of a kind not carried yet.
        InfeasibleError: nothing fits. NoSolutionInTimeError: the search was cut off.
    """
    asked = _asked(
        model, gpus=gpus, ram=ram, disk=disk, batch_size=batch_size, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, weight_dtype=weight_dtype, max_memory=max_memory, hardware=hardware, workload=workload,
        rules=rules, popularity=popularity, hub=hub, revision=revision, trust_remote_code=trust_remote_code,
        use_cache=use_cache, example_inputs=example_inputs, report=report, **more_work,
    )  # fmt: skip
    # What a time limit cuts off depends on the hour.
    keeps = asked.cacheable and rules.time_limit_s is None
    if keeps and (kept := _kept_plan(asked.name)) is not None:
        return kept
    with _collector_paused():
        try:
            found = search.best(asked.question, asked.hardware, asked.workload, rules, _predicting(report))
        except InfeasibleError as error:
            raise with_fixes(error, asked.question, asked.hardware, asked.workload, rules) from None
    if keeps and found.finished:
        cache.write(asked.name, found.plan.to_json())
    return found.plan


def frontier(model: Any, **options: Any) -> tuple[search.FrontierPoint, ...]:
    """Return plans that trade memory of the GPUs for time, the smallest first; options are those of `plan_model`.

    Raises:
        InputError: there is nothing to trade. Others as `plan_model`.
    """
    asked = _asked(model, **options)
    with _collector_paused():
        return search.frontier(
            asked.question, asked.hardware, asked.workload, options.get("rules", NO_RULES),
            _predicting(options.get("report", lambda text: None)),
        )  # fmt: skip


def plan_from_device_map(model: Any, device_map: Mapping[str, int | str], **options: Any) -> Plan:
    """Return what an Accelerate device map ({"model.layers.0": 0, "lm_head": "cpu", "": "disk"}) would take, run by
    this project's engine: a plan that no solver chose, with its prediction, whether or not it fits (`verify_plan`).

    Options are those of `plan_model`, without rules; for a layer graph `hardware` and `workload`.

    Raises:
        InputError: the map names a module or a device that is not there, leaves weights out, or splits a layer between
            two GPUs; or an argument cannot be used. TraceError: the model is of a kind not carried yet.
    """
    if options.get("rules", NO_RULES) != NO_RULES:
        raise InputError("a device map says where everything goes; rules cannot be followed beside it")
    if isinstance(model, LayerGraph):
        return _mapped_graph(model, device_map, **options)
    asked = _asked(model, **options)
    if asked.workload.objective in _SIZED:
        raise InputError(f"{asked.workload.objective} looks for another size of work, and a device map is for one")
    with _collector_paused():
        plan = asked.question.mapped(asked.hardware, asked.workload, device_map)
        return replace(plan, prediction=predict(plan))


def place(
    graph: LayerGraph,
    hardware: Hardware,
    workload: Workload,
    rules: Rules = NO_RULES,
    *,
    popularity: PopularityGiven = None,
    report: Report = lambda text: None,
) -> Plan:
    """Return the best plan for any layer graph, also one read from JSON (`LayerGraph.from_json`), with its prediction.

    The work is what the graph's passes were made for: its batch, its prompt and whether tokens are generated.
    `popularity` is as in `plan_model`; where it is left out, experts are as popular as the graph says.

    Raises:
        InputError: graph and work contradict each other, or a rule cannot be followed. InfeasibleError: nothing fits.
        NoSolutionInTimeError: the search was cut off.
    """
    from planner.placement.solution import find

    _check_graph(graph, workload)
    rules.check(graph, hardware)
    routed = Popularity.of(popularity)
    graph = graph if routed is None else routed.on(graph)
    report("placing")
    try:
        placements, slots, solver = find(graph, hardware, workload, rules)
    except InfeasibleError as error:
        raise with_fixes(error, GraphQuestion(graph, workload, report), hardware, workload, rules) from None
    assumptions = hardware.assumptions if routed is None else (routed.note(graph), *hardware.assumptions)
    plan = _of_graph(graph, hardware, workload, rules, assumptions, placements, slots, solver)
    report("simulating")
    return replace(plan, prediction=predict(plan))


def _mapped_graph(
    graph: LayerGraph, device_map: Mapping[str, int | str], *, hardware: Hardware, workload: Workload
) -> Plan:
    _check_graph(graph, workload)
    mapped = DeviceMap.read(device_map, hardware)
    mapped.check_names(graph)
    found, notes = placed(graph, hardware, mapped)
    slots = memory.needed_slots(graph, hardware, found)
    assumptions = (MAPPED, *notes, *hardware.assumptions)
    plan = _of_graph(graph, hardware, workload, NO_RULES, assumptions, found, slots, None)
    return replace(plan, prediction=predict(plan))


def _check_graph(graph: LayerGraph, workload: Workload) -> None:
    """Raise InputError where a graph cannot be planned for, or is not of this work."""
    graph.check()
    if not graph.passes:
        raise InputError("the graph has no pass; a plan needs what at least one forward call takes")
    if workload.objective in _SIZED:
        raise InputError(f"{workload.objective} looks for another size of work, and a graph is of one")
    if not graph.decode_passes and workload.decode_steps:
        raise InputError("the graph has no decode pass; give new_tokens=1, or passes decode_first and decode_last")
    count = chunks(workload.prompt_tokens, workload.prefill_chunk).count
    if min(count, 2) != min(len(graph.prefill_passes), 2):
        raise InputError(
            f"the work takes the prompt in {count} calls, and the graph has {len(graph.prefill_passes)} passes of it "
            "(prefill, and of chunks prefill_next, prefill_last and prefill_rest)"
        )
    if graph.batch_size != workload.rows:
        raise InputError(f"the graph is of {graph.batch_size} sequences at a time, and the work of {workload.rows}")


def _of_graph(
    graph: LayerGraph,
    hardware: Hardware,
    workload: Workload,
    rules: Rules,
    assumptions: tuple[str, ...],
    placements: Sequence[Placement],
    slots: Sequence[Slots],
    solver: Solver | None,
) -> Plan:
    """Return a plan for a graph that was given as one; it has no prediction yet."""
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo(
            id=graph.model,
            source="graph",
            note="",
            revision=None,
            config_digest=None,
            weight_dtype=weight_dtype(graph),
            num_parameters=graph.num_parameters,
            weight_bytes=graph.weight_bytes,
            versions={},
        ),
        graph=graph,
        hardware=hardware,
        workload=workload,
        rules=rules,
        execution=Execution(attention=None, experts=None),
        assumptions=assumptions,
        placements=tuple(placements),
        slots=tuple(slots),
        prediction=None,
        solver=solver,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a caller asked, made into values; name: of the answer in the cache."""

    question: Question
    hardware: Hardware
    workload: Workload
    name: str
    cacheable: bool


def _asked(
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
    rules: Rules = NO_RULES,
    popularity: PopularityGiven = None,
    hub: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_cache: bool = True,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    report: Report = lambda text: None,
    **more_work: Any,
) -> _Asked:
    notes: list[str] = []
    if workload is None:
        workload = _workload(batch_size, prompt_tokens, new_tokens, notes, more_work)
    elif (batch_size, prompt_tokens, new_tokens) != (None, None, None) or more_work:
        raise InputError("give a workload, or batch_size, prompt_tokens and the like, not both")
    if example_inputs is not None and workload.objective in _SIZED:
        raise InputError(f"example inputs are of one size, and {workload.objective} looks for another; leave one out")
    workload = _as_long_as(workload, example_inputs)
    if hardware is None:
        hardware = Hardware.from_options(gpus, ram=ram, disk=disk, max_memory=max_memory)
    elif max_memory:
        hardware = hardware.with_max_memory(max_memory)
    source, module = source_of(model, hub=hub, revision=revision, trust_remote_code=trust_remote_code)
    stored = None
    if source.source in ("local", "hub"):
        on_hub = source.source == "hub"
        stored = find_headers(folder=source.folder, hub=on_hub, name=source.id, revision=source.revision, notes=notes)
    dtype = dtype_of(weight_dtype, source, module, stored, notes)
    routed = Popularity.of(popularity)
    parts = {
        "model": [source.id, source.source, source.revision, source.config_digest],
        "hardware": hardware,
        "workload": workload,
        "rules": rules,
        "popularity": routed,
        "dtype": dtype,
        "notes": notes,
        "stored": stored and stored.digest(),
    }
    cacheable = use_cache and module is None
    question = Question(
        source, module, dtype, notes, stored=stored, popularity=routed, trust_remote_code=trust_remote_code,
        examples=example_inputs, use_cache=cacheable, report=report,
    )  # fmt: skip
    return _Asked(
        question=question, hardware=hardware, workload=workload, name=cache.key("plan", parts), cacheable=cacheable
    )


def _predicting(report: Report) -> search.Predict:
    def predicted(plan: Plan) -> Prediction:
        report("simulating")
        return predict(plan)

    return predicted


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


def predict(plan: Plan) -> Prediction:
    """Return what the plan will take: memory from its placement, time from the simulator."""
    simulate = importlib.import_module("simulate")
    timeline = simulate.run(plan)
    peaks = memory.peak(plan.graph, plan.hardware, plan.placements, plan.slots)
    outputs = memory.operator_outputs(plan.graph, plan.placements)
    asked = memory.operator_outputs(plan.graph, plan.placements, with_scratch=True)
    prefill_range, decode_range = _ranges(plan, simulate.run)
    decode_ns = timeline.decode_ns_per_token
    per_token = decode_ns or timeline.prefill_ns
    return Prediction(
        peak_bytes={name: usage.total for name, usage in sorted(peaks.items())},
        peak_breakdown={name: usage.by_kind() for name, usage in sorted(peaks.items())},
        counters=_counters(plan, peaks, outputs, asked),
        prefill_ns=timeline.prefill_ns,
        decode_ns_per_token=decode_ns,
        total_ns=timeline.total_ns,
        tokens_per_s=round(plan.workload.batch_size * 1e9 / per_token, 3) if per_token else 0.0,
        load_ns=loading.read_ns(plan),
        load_peak_bytes=loading.load_peak_bytes(plan),
        prefill_ns_range=prefill_range,
        decode_ns_range=decode_range,
    )


def _ranges(plan: Plan, run: Callable[[Plan], Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return from what to what prefill and decode step may take: with all rates higher and lower by their spread."""
    if not plan.hardware.is_spread:
        return (), ()
    ends = [run(replace(plan, hardware=each)) for each in (plan.hardware.faster(), plan.hardware.slower())]
    prefill, decode = tuple(end.prefill_ns for end in ends), tuple(end.decode_ns_per_token for end in ends)
    return prefill, decode if any(decode) else ()


def _counters(
    plan: Plan, peaks: Mapping[str, memory.Usage], outputs: Mapping[str, int], asked: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Return every device's figures under the names of the counters that they are tested against."""
    kept = loading.kept_bytes(plan)
    result = {}
    for name, nbytes in sorted(outputs.items()):
        result[name] = {"operator_outputs": nbytes, "requested_by_operators": asked[name]}
        if plan.hardware.device(name).kind != "cpu":
            usage = peaks[name]
            result[name]["tensors"] = kept.get(name, 0) + nbytes
            result[name] |= {"reserved": usage.total - usage.context, "device_used": usage.total}
    return result


def predict_memory(
    model: Any,
    workload: Workload | Mapping[str, Any] | tuple[Any, ...] | Any = None,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    gpu: str | None = None,
    threads: int | None = None,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    experts: str | None = None,
    weight_dtype: str | None = None,
    hub: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    report: Report = lambda text: None,
) -> MemoryPrediction:
    """Return what `model` (a name or folder, a transformers config, or any module) takes on one device.

    workload: a Workload, or example inputs for one forward call of any module: a tensor, a tuple of arguments, or a
        dict of keywords. With a Workload, `example_inputs` replaces the prompts that would be made up.
    device, gpu: "cuda" is the GPU product named (`plan gpus` lists them), "cpu" this machine's CPU; the default is
        "cuda" where a product is named, else "cpu".
    threads: of the CPU; torch's own setting where None.
    experts: the implementation of fused experts; grouped matrix products where None.

    The model is wholly on the device, each weight an allocation of its own, as `.to(device)` leaves it.

    Raises:
        InputError: an argument cannot be used. TraceError: the model cannot be traced, and where.
    """
    notes: list[str] = []
    device = device or ("cuda" if gpu else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; memory is predicted for 'cpu' and 'cuda'")
    if gpu is not None and device == "cpu":
        raise InputError(f"device 'cpu' and the GPU {gpu!r} exclude each other; leave one out")
    if gpu is not None:
        facts = product(gpu)
        if facts.maker != "products":
            raise InputError(f"{facts.name}: kernels are modelled for NVIDIA's GPUs only; plan gpus lists them")
        gpu = facts.key
    if threads is not None and (device != "cpu" or threads < 1):
        raise InputError(f"threads={threads}: a whole number of at least 1, for the device 'cpu'")
    work, examples = _work(workload, example_inputs, notes)
    if work.cache == "offloaded":
        raise InputError("the offloaded cache is predicted with a plan (plan_model, --cache offloaded) only")
    source, module = source_of(model, hub=hub, revision=revision, trust_remote_code=trust_remote_code)
    stored = None
    if source.source in ("local", "hub"):
        stored = find_headers(
            folder=source.folder, hub=source.source == "hub", name=source.id, revision=source.revision, notes=notes
        )
    dtype = dtype_of(weight_dtype, source, module, stored, notes)
    with _collector_paused():
        if module is None:
            report("building the model on meta")
            module = build_on_meta(source, dtype, trust_remote_code=trust_remote_code)
        report("tracing")
        return _footprint(module, work, examples, device, gpu, threads, experts, notes)


def _footprint(
    model: Any,
    work: Workload,
    examples: Any,
    device: str,
    gpu: str | None,
    threads: int | None,
    experts: str | None,
    notes: list[str],
) -> MemoryPrediction:
    from planner import execution, footprint
    from planner.kernels.cpu import CpuKernels

    kernels = None
    if device == "cpu":
        kernels = CpuKernels.local()
        kernels = kernels if threads is None else replace(kernels, threads=threads)
        notes.append(f"kernels on {kernels.threads} threads with {kernels.isa}")
    elif gpu is None:
        notes.append("a GPU of compute capability 8.9 with 128 multiprocessors (assumed)")
    if experts is None and execution.experts_modules(model):
        experts = execution.GROUPED_EXPERTS
        own = getattr(model.config, "_experts_implementation", None)
        notes.append(f"experts run as {experts}, as dispatch sets them; the model's own setting is {own}")
    options: dict[str, Any] = {
        "gpu": (gpu or "") if device == "cuda" else None, "experts": experts, "examples": examples, "kernels": kernels,
    }  # fmt: skip
    tracing = tracing_for(model, work, **options)
    weights = tracing.weights()
    entries, traced = footprint.phases(tracing, sum(weights))
    if device == "cuda":
        entries = footprint.on_cuda(tracing, entries, weights)
    peak = footprint.peak_of(entries)
    expected = None
    if experts not in (None, execution.GROUPED_EXPERTS, "grouped_mm", "batched_mm"):
        drawn = [tracing_for(model, work, **options, routing_seed=seed) for seed in range(_DRAWN_ROUTINGS)]
        peaks = [footprint.peak_of(footprint.phases(each, sum(weights))[0]) for each in drawn]
        expected = footprint.mean_of(peaks)
        notes.append(f"every figure at the worst routing but the expected one: {_DRAWN_ROUTINGS} even draws, seeded")
    context = Hardware.from_options(f"1x{gpu}" if gpu else "1x24GB").gpus[0].context_bytes
    return footprint.MemoryPrediction(
        model=type(model).__name__,
        device=device if gpu is None else gpu,
        attention=attention_of(model),
        experts=experts,
        weight_bytes=sum(weights),
        prefill=entries[0],
        decode=tuple(entries[1:]),
        peak=peak,
        device_used_bytes=None if peak.reserved_bytes is None else peak.reserved_bytes + context,
        expected_peak=expected,
        traced_steps=traced,
        unmodelled=tuple(sorted(tracing.first.unmodelled)),
        assumptions=(*notes, *tracing.inputs.notes),
    )


def _work(workload: Any, examples: Any, notes: list[str]) -> tuple[Workload, Any]:
    """Return the workload and the example inputs that `predict_memory` was given."""
    if isinstance(workload, Workload):
        return _as_long_as(workload, examples), examples
    if workload is None and examples is None:
        return _workload(None, None, None, notes, {}), None
    if workload is not None and examples is not None:
        raise InputError("give example inputs once, as the workload or by name")
    given = examples if workload is None else workload
    if not isinstance(given, (Mapping, tuple)):
        given = (given,)
    return Workload(caller="forward", new_tokens=1), given


def _as_long_as(workload: Workload, examples: Any) -> Workload:
    """Return the workload with the batch and the prompt's length of example prompts."""
    ids = examples.get("input_ids") if isinstance(examples, Mapping) else None
    if ids is None or len(ids.shape) != 2:
        return workload
    return replace(workload, batch_size=int(ids.shape[0]), prompt_tokens=int(ids.shape[1]))


def _workload(
    batch: int | None, prompt: int | None, new: int | None, notes: list[str], more: Mapping[str, Any]
) -> Workload:
    unknown = sorted(set(more) - set(Workload.__slots__))
    if unknown:
        raise InputError(f"{unknown[0]} is no option, and no field of a Workload: {', '.join(Workload.__slots__)}")
    objective = more.get("objective")
    least_prompt = search.CONTEXT_STEP_TOKENS if objective == "max-context" else DEFAULT_PROMPT_TOKENS
    if prompt is None:
        at_least = "at least " if objective == "max-context" else ""
        notes.append(f"a prompt of {at_least}{least_prompt} tokens (assumed)")
    if new is None:
        notes.append(f"{DEFAULT_NEW_TOKENS} new tokens (assumed)")
    if batch is None:
        notes.append(f"a batch of {'at least ' if objective in ('max-batch', 'throughput') else ''}1 (assumed)")
    return Workload(
        batch_size=1 if batch is None else batch,
        prompt_tokens=least_prompt if prompt is None else prompt,
        new_tokens=DEFAULT_NEW_TOKENS if new is None else new,
        **more,
    )


def _kept_plan(name: str) -> Plan | None:
    text = cache.read(name)
    if text is None:
        return None
    try:
        return Plan.from_json(text)
    except PlanFormatError:
        return None
