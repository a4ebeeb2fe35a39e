"""A plan made by hand for two GPUs, RAM and disk: twelve layers of experts, some resident, some not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from planner import memory
from planner.graph import Layer, LayerGraph, LayerKind, Tensor, WeightGroup
from planner.hardware import Hardware
from planner.plan import Execution, ModelInfo, Placement, Plan, Prediction, Solver
from planner.rules import Rules
from planner.units import GB, MB
from planner.workload import Workload
from simulate.timeline import Interval, MemorySample, Timeline

LAYERS = 12
EXPERTS = 8


def group(name: str, nbytes: int, slices: int = 1) -> WeightGroup:
    tensor = Tensor(name=f"{name}.weight", shape=(slices, nbytes // slices // 2), dtype="bfloat16", nbytes=nbytes)
    return WeightGroup(name=name, slices=slices, used_slices=min(2, slices), streamable=slices > 1, tensors=(tensor,))


@pytest.fixture
def graph() -> LayerGraph:
    kinds = (
        LayerKind(name="Embedding", groups=(group("weights", 250 * MB),)),
        LayerKind(
            name="Block",
            groups=(
                group("self_attn", 80 * MB),
                group("mlp.experts", 2_800 * MB, EXPERTS),
                group("rest", 40_960),
            ),
        ),
        LayerKind(name="Linear", groups=(group("weights", 260 * MB),)),
    )
    blocks = tuple(Layer(name=f"model.layers.{number}", kind=1) for number in range(LAYERS))
    layers = (Layer(name="model.embed_tokens", kind=0), *blocks, Layer(name="lm_head", kind=2))
    return LayerGraph(
        model="acme/moe",
        batch_size=1,
        kinds=kinds,
        layers=layers,
        edges=(),
        ties=(),
        loose=(),
        allocator_bytes=0,
        passes=(),
    )


@pytest.fixture
def hardware() -> Hardware:
    return Hardware.from_options("2x24GB", ram="64GB", disk="500GB")


def placed(graph: LayerGraph) -> tuple[Placement, ...]:
    """Of layers 0 to 5 cuda:0 keeps 6 experts each, of 6 to 10 cuda:1 keeps 5; the last waits on disk."""
    placements = []
    for index, layer in enumerate(graph.layers):
        device = "cuda:0" if index <= 6 else "cuda:1"
        for entry in graph.kind_of(index).groups:
            home, kind, kept = device, "device", None
            if entry.slices > 1:
                kept = 0 if index == LAYERS else 6 if device == "cuda:0" else 5
                home, kind = ("disk", "disk") if kept == 0 else ("cpu", "pinned")
            placements.append(
                Placement(
                    layer=layer.name,
                    group=entry.name,
                    home=home,
                    memory=kind,  # type: ignore[arg-type]
                    run_on=device,
                    nbytes=entry.nbytes,
                    resident_slices=kept,
                )
            )
    return tuple(placements)


@pytest.fixture
def plan(graph: LayerGraph, hardware: Hardware) -> Plan:
    placements = placed(graph)
    slots = memory.needed_slots(graph, hardware, placements)
    used = memory.static_usage(graph, hardware, placements, slots)
    breakdown = {name: usage.by_kind() for name, usage in used.items()}
    for device in ("cuda:0", "cuda:1"):
        breakdown[device] |= {"kv_cache": 123 * MB, "activations": 45 * MB}
    return Plan(
        schema_version=2,
        model=ModelInfo(
            id="acme/moe",
            source="catalogue",
            note="bundled",
            revision=None,
            config_digest="ab" * 32,
            weight_dtype="bfloat16",
            num_parameters=graph.num_parameters,
            weight_bytes=graph.weight_bytes,
            versions={"torch": "2.11.0", "transformers": "5.17.0"},
        ),
        graph=graph,
        hardware=hardware,
        workload=Workload(prompt_tokens=1024, new_tokens=64),
        rules=Rules(),
        execution=Execution(attention="sdpa", experts="loadplan_routed"),
        assumptions=("routers pick every expert equally often", "a < b & c"),
        placements=placements,
        slots=slots,
        prediction=Prediction(
            peak_bytes={name: sum(kinds.values()) for name, kinds in breakdown.items()},
            peak_breakdown=breakdown,
            counters={},
            prefill_ns=1_234_000_000,
            decode_ns_per_token=56_700_000,
            total_ns=4_806_100_000,
            tokens_per_s=13.3,
            load_ns=9_870_000_000,
            load_peak_bytes={name: kinds["weights"] for name, kinds in breakdown.items()},
        ),
        solver=Solver(status="optimal", objective_ns=4_000_000_000, bound_ns=4_000_000_000, cost_model="lanes-1"),
    )


def sample(time_ns: int, device: str, **kinds: int) -> MemorySample:
    empty = dict.fromkeys(("weights", "kv_cache", "activations", "slots", "workspace", "context"), 0)
    return MemorySample(time_ns=time_ns, device=device, **(empty | kinds))


@pytest.fixture
def timeline(plan: Plan) -> Timeline:
    """Three steps of 64 simulated: the prefill of 1 s, then decode steps of 50 ms."""
    steps = (0, 1, 63)
    step_ns = (10**9, *([50_000_000] * 63))
    intervals, samples = [], []
    for step in steps:
        start = sum(step_ns[:step])
        part = step_ns[step] // (2 * len(plan.graph.layers))
        for index, (layer, device) in enumerate(zip(plan.graph.layers, plan.run_on(), strict=True)):
            at = start + 2 * part * index
            intervals += [
                Interval(lane=f"cpu→{device} copy", start_ns=at, end_ns=at + part, action="copy",
                         label=f"copy {layer.name}", step=step),
                Interval(lane=f"{device} compute", start_ns=at + part, end_ns=at + 2 * part, action="run",
                         label=f"run {layer.name}", step=step),
            ]  # fmt: skip
            samples.append(sample(at, device, weights=20 * GB, kv_cache=step * MB, activations=index * MB))
    samples.append(sample(0, "cpu", weights=30 * GB))
    samples.sort(key=lambda entry: entry.time_ns)
    return Timeline(intervals=tuple(intervals), memory=tuple(samples), simulated_steps=steps, step_ns=step_ns)


@pytest.fixture(name="sample")
def sample_fixture() -> Callable[..., MemorySample]:
    """Return the maker of samples, for tests that need their own."""
    return sample
