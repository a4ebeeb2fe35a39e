"""A model that plans are asked of, for one machine and one piece of work after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner import cache, loading
from planner.device_map import MAPPED, DeviceMap, placed
from planner.errors import InfeasibleError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.memory import needed_slots
from planner.models import ModelSource, load_config
from planner.plan import SCHEMA_VERSION, Execution, ModelInfo, Placement, Plan, Slots, Solver
from planner.popularity import Popularity
from planner.products import kernels_of
from planner.rules import NO_RULES, Rules
from planner.tracer import ASSUMED_CPU, Report, Tracer
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.headers import Headers


class Question:
    """Solves for any machine, work and rules; the model is built once, and traced once for each piece of work."""

    def __init__(
        self,
        source: ModelSource,
        module: Any,
        dtype: str,
        notes: Sequence[str],
        *,
        stored: Headers | None = None,
        popularity: Popularity | None = None,
        trust_remote_code: bool = False,
        examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
        use_cache: bool = True,
        report: Report = lambda text: None,
    ):
        self.source, self.dtype, self.notes, self.report = source, dtype, tuple(notes), report
        self._module, self._stored, self._examples = module, stored, examples
        self._trust_remote_code, self._use_cache = trust_remote_code, use_cache
        self._popularity = popularity
        self._tracers: dict[object, Tracer] = {}
        self._traced: dict[object, tuple[LayerGraph, Execution]] = {}

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> Plan:
        """Return the best plan; it has no prediction yet.

        Raises:
            TraceError: the model is of a kind not carried yet. InfeasibleError: nothing fits.
            NoSolutionInTimeError: the search was cut off.
        """
        from planner.placement.solution import find

        tracer = self._tracer(hardware, workload)
        fits_whole = tracer.weight_bytes() <= sum(
            pool.usable_bytes for pool in hardware.pools if pool.name != hardware.disk(pool.name)
        )
        may_group = self.dtype == "bfloat16" and fits_whole
        outweighs = bool(hardware.gpus) and tracer.weight_bytes() > sum(
            hardware.pool(gpu.name).usable_bytes for gpu in hardware.gpus
        )
        # Grouped matmul needs every expert where it computes; what the GPUs cannot hold is most likely to be streamed.
        routed = not may_group or outweighs
        graph, execution = self._trace(tracer, routed=routed)
        workload = _carried(graph, workload)
        self.report("placing")
        rules.check(graph, hardware)
        try:
            placements, slots, solver = find(graph, hardware, workload, rules)
        except InfeasibleError:
            if routed or execution.experts is None:
                raise
            placements = ()
        stay = bool(placements) and _experts_stay(placements)
        if execution.experts is not None and may_group and stay == routed:
            self.report("tracing experts run otherwise")
            other, run = self._trace(tracer, routed=not routed)
            try:
                found = find(other, hardware, workload, rules)
            except InfeasibleError:
                if not routed:
                    raise
            else:
                if not routed or _experts_stay(found[0]):
                    graph, execution, (placements, slots, solver) = other, run, found
        return self._finished(tracer, graph, execution, hardware, workload, rules, placements, slots, solver)

    def mapped(self, hardware: Hardware, workload: Workload, given: Mapping[str, int | str]) -> Plan:
        """Return the plan that a device map is; it has no prediction yet.

        Raises:
            InputError: the map cannot be followed. TraceError: the model is of a kind not carried yet.
        """
        mapped = DeviceMap.read(given, hardware)
        tracer = self._tracer(hardware, workload)
        may_group = self.dtype == "bfloat16"
        graph, execution = self._trace(tracer, routed=not may_group)
        if mapped.unknown(graph):
            mapped.check_names(graph, {name for name, _ in tracer.built().named_modules()})
        found, notes = placed(graph, hardware, mapped)
        if execution.experts is not None and may_group and not _experts_stay(found):
            self.report("tracing routed experts")
            graph, execution = self._trace(tracer, routed=True)
            found, notes = placed(graph, hardware, mapped)
        plan = self._finished(
            tracer, graph, execution, hardware, _carried(graph, workload), NO_RULES, found,
            needed_slots(graph, hardware, found), None,
        )  # fmt: skip
        return replace(plan, assumptions=(MAPPED, *notes, *plan.assumptions))

    def _finished(
        self,
        tracer: Tracer,
        graph: LayerGraph,
        execution: Execution,
        hardware: Hardware,
        workload: Workload,
        rules: Rules,
        placements: Sequence[Placement],
        slots: Sequence[Slots],
        solver: Solver | None,
    ) -> Plan:
        """Return the plan with these placements, and with what was assumed."""
        plan = Plan(
            schema_version=SCHEMA_VERSION,
            model=ModelInfo(
                id=self.source.id,
                source=self.source.source,
                note=self.source.note,
                revision=self.source.revision,
                config_digest=self.source.config_digest,
                weight_dtype=self.dtype,
                num_parameters=graph.num_parameters,
                weight_bytes=graph.weight_bytes,
                versions=cache.versions(),
                loaded=tracer.loaded,
                stored_bytes=None if self._stored is None else self._stored.total_bytes,
            ),
            graph=graph,
            hardware=hardware,
            workload=workload,
            rules=rules,
            execution=execution,
            assumptions=(
                *self.notes, *tracer.notes, *_execution_notes(workload, execution, hardware, self._routed(graph)),
                *hardware.assumptions,
            ),
            placements=tuple(placements),
            slots=tuple(slots),
            prediction=None,
            solver=solver,
        )  # fmt: skip
        shortage = loading.shortage(plan)
        return plan if shortage is None else replace(plan, assumptions=(*plan.assumptions, shortage))

    def graph(self, hardware: Hardware, workload: Workload) -> LayerGraph:
        """Return the trace that the last plan for this work was searched with, whether or not anything fitted."""
        tracer = self._tracer(hardware, workload)
        return next(self._traced[key][0] for key in ((id(tracer), True), (id(tracer), False)) if key in self._traced)

    def positions(self) -> int | None:
        """Return how many tokens the model knows positions of, prompt and answer together; None where it has no end."""
        config = getattr(self._module, "config", None)
        if config is None and self.source.config:
            config = load_config(self.source, trust_remote_code=self._trust_remote_code)
        if config is None:
            return None
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(text, "max_position_embeddings", None)
        return found if isinstance(found, int) and not getattr(config, "is_encoder_decoder", False) else None

    def _tracer(self, hardware: Hardware, workload: Workload) -> Tracer:
        workload = replace(workload, objective="latency")
        gpu = hardware.gpus[0].product if hardware.gpus else None
        tracer = self._tracers.get((gpu, workload))
        if tracer is None:
            tracer = Tracer(
                self.source, self._module, workload, self.dtype, self._trust_remote_code, use_cache=self._use_cache,
                report=self.report, hardware=hardware, examples=self._examples,
            )  # fmt: skip
            tracer.headers = self._stored
            tracer.loaded = self._is_loaded(tracer)
            self._tracers[gpu, workload] = tracer
        return tracer

    def _is_loaded(self, tracer: Tracer) -> bool:
        first = next(iter(self._tracers.values()), tracer)
        return first.loaded

    def _trace(self, tracer: Tracer, *, routed: bool) -> tuple[LayerGraph, Execution]:
        key = (id(tracer), routed)
        if key not in self._traced:
            graph, execution = tracer.trace(routed=routed)
            self._traced[key] = (graph if self._popularity is None else self._popularity.on(graph)), execution
            self._module = tracer.module
        return self._traced[key]

    def _routed(self, graph: LayerGraph) -> str | None:
        """Return what is assumed of the experts' popularity where that was given."""
        return None if self._popularity is None else self._popularity.note(graph)


def _carried(graph: LayerGraph, workload: Workload) -> Workload:
    """Return the work as the graph carries it: one forward call of what generates nothing."""
    if graph.decode_passes or not workload.decode_steps:
        return workload
    return replace(workload, caller="forward", new_tokens=1, prefill_chunk=None, cache="dynamic")


def _experts_stay(placements: Sequence[Placement]) -> bool:
    return all(p.home == p.run_on for p in placements if p.resident_slices is not None)


def _execution_notes(workload: Workload, execution: Execution, hardware: Hardware, routed: str | None) -> list[str]:
    choice = "greedy decoding (assumed)" if workload.sampling == "greedy" else "sampling"
    if workload.num_beams > 1:
        choice = f"{workload.num_beams} beams" + (", sampled" if workload.sampling == "sample" else "")
    if workload.caller == "forward":
        choice = "plain forward calls"
    attention = f"{execution.attention} attention, " if execution.attention is not None else ""
    chunk = workload.prefill_chunk
    cut = "" if chunk is None else f", in chunks of {chunk:,} tokens: call generate with prefill_chunk_size={chunk}"
    notes = [f"{attention}{workload.cache} cache, {choice}; prompts of equal length{cut}"]
    if workload.cache == "offloaded":
        notes.append(
            "keys and values wait in pinned host memory, in blocks of powers of two, as transformers' offloaded cache "
            'leaves them (read in its code, not measured): call generate with cache_implementation="offloaded"'
        )
    if execution.experts is not None:
        notes.append(
            f"experts run as {execution.experts}: memory counts the worst routing, time the expected number of "
            f"distinct experts{', each equally popular (assumed)' if routed is None else ''}"
        )
    notes += [] if routed is None else [routed]
    if hardware.gpus:
        on = kernels_of(hardware.gpus[0].product)
        notes.append(f"operators and their scratch as torch runs them on {on}, by its sources")
    else:
        notes.append(f"operators' scratch as on {ASSUMED_CPU['threads']} threads with {ASSUMED_CPU['isa']} (assumed)")
    if execution.unmodelled:
        notes.append(f"scratch not modelled of {', '.join(execution.unmodelled)}")
    return notes
