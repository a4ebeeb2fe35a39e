"""The peers that plans are compared with: their rules against arithmetic by hand, their maps against the checker."""

from __future__ import annotations

import dataclasses
import json
import math

import placement
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peers
import random_graphs
import simulate
from peers import NoMapError, Task, Where
from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware
from planner.placement.solution import find
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, build_graph, end_kind, gpu, group, machine, span

WORK = Workload(batch_size=1, prompt_tokens=8, new_tokens=3)
# What a GPU of small_cases holds before any weights: context, workspace, and what the allocator keeps.
FIXED = 3 * MIB + MIB + 22 * MIB


def chain(count: int, *, block: int = 12 * MIB, end: int = MIB, ties: bool = False) -> LayerGraph:
    """Return an embedding, `count` blocks of two groups and a head; activations and caches take nothing."""
    kind = LayerKind(name="Block", groups=(group("attn", block // 3), group("mlp", block - block // 3)))
    kinds = [end_kind("Embedding", end), kind, end_kind("Head", end)]
    order = [("embed", 0), *[(f"layers.{i}", 1) for i in range(count)], ("head", 2)]
    spans = [[span(flops=10**9, moved=10**6)] * 3 for _ in kinds]
    tied = (("embed.weights.weight", "head.weights.weight"),) if ties else ()
    return build_graph(kinds, spans, order, ties=tied)


def task_of(graph: LayerGraph, gpu_bytes: list[int], *, cpu: int = 10**9, disk: int = 10**9) -> Task:
    gpus = [gpu(index, product="big", flops=10**14, rate=10**12) for index in range(len(gpu_bytes))]
    capacities = {f"cuda:{index}": size for index, size in enumerate(gpu_bytes)} | {"cpu": cpu, "disk": disk}
    return Task(graph=graph, hardware=machine(gpus, capacities), workload=WORK)


def run_on(task: Task, placements: tuple[object, ...]) -> list[str]:
    return list(peers.plan_of(task, placements).run_on())  # type: ignore[arg-type]


# exo's shares


@pytest.mark.parametrize(
    ("layers", "capacities", "expected"),
    [
        (32, [24, 24], [16, 16]),
        # 61 * 80/152 = 32.1, * 48/152 = 19.3, * 24/152 = 9.6: the one left goes to the last
        (61, [80, 48, 24], [32, 19, 10]),
        # 2.9, 0.03, 0.03: the one left goes to the first, and then each of the others takes one from it
        (3, [100, 1, 1], [1, 1, 1]),
        (5, [3], [5]),
    ],
)
def test_proportional_shares_by_hand(layers: int, capacities: list[int], expected: list[int]) -> None:
    assert peers.proportional(layers, capacities) == expected


@given(st.integers(1, 200), st.lists(st.integers(1, 10**12), min_size=1, max_size=9))
def test_proportional_shares_are_within_one_of_the_exact_share(layers: int, capacities: list[int]) -> None:
    if layers < len(capacities):
        with pytest.raises(NoMapError):
            peers.proportional(layers, capacities)
        return
    sizes = peers.proportional(layers, capacities)
    assert sum(sizes) == layers
    assert min(sizes) >= 1
    exact = [layers * capacity / sum(capacities) for capacity in capacities]
    if min(exact) >= 1:
        assert all(math.floor(e - 1e-9) <= size <= math.ceil(e + 1e-9) for e, size in zip(exact, sizes, strict=True))


@pytest.mark.parametrize(
    ("layers", "capacities", "expected"),
    [
        (32, [16, 8, 8], [16, 8, 8]),
        # 0.52632 * 61 = 32.1; 0.84211 * 61 = 51.4
        (61, [80, 48, 24], [32, 19, 10]),
        # 0.33333, 0.66666: 3 and 6 of ten
        (10, [1, 1, 1], [3, 3, 4]),
        # 0.33333 * 3 is less than one: the first gets none
        (3, [1, 1, 1], [0, 1, 2]),
    ],
)
def test_ring_shares_by_hand(layers: int, capacities: list[int], expected: list[int]) -> None:
    assert peers.ring_shares(layers, capacities) == expected


def test_exo_gives_ends_to_the_neighbouring_block() -> None:
    task = task_of(chain(6), [100 * MIB, 200 * MIB])
    assert run_on(task, peers.exo_proportional(task)) == ["cuda:0"] * 3 + ["cuda:1"] * 5
    # The ring begins with the larger one.
    assert run_on(task, peers.exo_ring(task)) == ["cuda:1"] * 5 + ["cuda:0"] * 3
    # 74 MiB of weights are less than the larger one holds, and than the smaller one too, which it does not choose.
    assert run_on(task, peers.exo_fewest(task)) == ["cuda:1"] * 8
    # Here it takes two of three, in the order of the machine: 60/130 and 70/130 of six blocks.
    task = task_of(chain(6), [60 * MIB, 50 * MIB, 70 * MIB])
    assert run_on(task, peers.exo_fewest(task)) == ["cuda:0"] * 4 + ["cuda:2"] * 4


def test_exo_offloads_nothing() -> None:
    task = task_of(chain(6), [60 * MIB])
    assert peers.score(task, peers.exo_proportional).simulated_ns is None
    assert "overfills cuda:0" in (peers.score(task, peers.exo_proportional).why or "")
    assert peers.score(task, peers.greedy).simulated_ns is not None


# Device maps


def test_a_device_map_is_read_by_whole_path_components() -> None:
    task = task_of(chain(11), [10**9, 10**9])
    mapped = {"embed": 0, "layers.1": 1, "layers.10": "disk", "head": "cpu"}
    mapped |= {f"layers.{i}": "cpu" for i in (0, *range(2, 10))}
    wheres = peers.wheres_of(task, mapped)
    assert wheres[0] == Where(run_on="cuda:0", home="cuda:0")
    assert wheres[2] == Where(run_on="cuda:1", home="cuda:1")
    assert wheres[11] == Where(run_on="cuda:0", home="disk")
    assert {wheres[i] for i in (1, *range(3, 11), 12)} == {Where(run_on="cuda:0", home="cpu")}


def test_without_a_gpu_in_it_a_map_runs_on_the_host() -> None:
    task = task_of(chain(2), [10**9])
    wheres = peers.wheres_of(task, {"": "cpu", "layers.1": "disk"})
    assert wheres[2] == Where(run_on="cpu", home="disk")
    assert {wheres[i] for i in (0, 1, 3)} == {Where(run_on="cpu", home="cpu")}


@pytest.mark.parametrize(
    ("mapped", "why"),
    [
        ({"": 0, "layers.1.attn": 1}, "splits layers.1"),
        ({"embed": 0, "layers.0": 0, "head": 0}, "leaves layers.1 out"),
    ],
)
def test_a_map_that_is_not_of_our_layers_is_void(mapped: dict[str, int | str], why: str) -> None:
    task = task_of(chain(2), [10**9, 10**9])
    with pytest.raises(NoMapError, match=why):
        peers.wheres_of(task, mapped)


def test_what_must_not_wait_elsewhere_stays_where_it_runs() -> None:
    task = task_of(chain(1), [10**9])
    placed = peers.placements_of(task, [Where(run_on="cuda:0", home="cpu")] * 3)
    assert [(entry.layer, entry.home, entry.memory) for entry in placed] == [
        ("embed", "cuda:0", "device"),
        ("layers.0", "cpu", "pinned"),
        ("layers.0", "cpu", "pinned"),
        ("head", "cuda:0", "device"),
    ]
    assert verify_plan(peers.plan_of(task, placed)) == ()


def test_experts_stay_whole_or_wait_whole() -> None:
    kind = LayerKind(name="Block", groups=(group("attn", MIB), group("experts", MIB, slices=4, used=2)))
    graph = build_graph([kind], [[span(flops=10**9)] * 3], [("layers.0", 0), ("layers.1", 0)])
    task = task_of(graph, [10**9])
    placed = peers.placements_of(task, [Where(run_on="cuda:0", home="cuda:0"), Where(run_on="cuda:0", home="cpu")])
    assert [entry.resident_slices for entry in placed] == [None, 4, None, 0]
    assert verify_plan(peers.plan_of(task, placed)) == ()


# Accelerate's own maps


def test_accelerate_fills_one_device_after_the_other() -> None:
    """By hand: GPU 0 and the host keep room for the largest layer to come, 12 MiB; the second GPU keeps none."""
    task = task_of(chain(7), [40 * MIB, 25 * MIB], cpu=30 * MIB)
    mapped = peers.device_map(task, "sequential", peers.max_memory_of(task.hardware))
    # 40 - 12: the embedding and two blocks, 25; 25: two blocks; 30 - 12: one block; the rest to disk
    assert [look(mapped, name) for name in layer_names(task)] == [0, 0, 0, 1, 1, "cpu", "disk", "disk", "disk"]


def look(mapped: dict[str, int | str], name: str) -> int | str:
    return next(value for key, value in mapped.items() if key == name or name.startswith(f"{key}."))


def layer_names(task: Task) -> list[str]:
    return [layer.name for layer in task.graph.layers]


def test_accelerate_balances_before_it_fills() -> None:
    """By hand: 74 MiB over two GPUs are 37 each, and 1.25 * 12 MiB of slack; what GPU 0 keeps free comes off it."""
    task = task_of(chain(6), [200 * MIB, 200 * MIB])
    mapped = peers.device_map(task, "auto", peers.max_memory_of(task.hardware))
    # 37 + 15 - 12 = 40: the embedding and three blocks
    assert [look(mapped, name) for name in layer_names(task)] == [0] * 4 + [1] * 4
    assert mapped == peers.device_map(task, "balanced", peers.max_memory_of(task.hardware))


def test_accelerate_treats_tied_layers_together() -> None:
    """By hand: 50 - 12 on GPU 0: the embedding with the head, 8 MiB once, and two blocks."""
    task = task_of(chain(4, end=8 * MIB, ties=True), [50 * MIB, 200 * MIB])
    mapped = peers.device_map(task, "sequential", peers.max_memory_of(task.hardware))
    assert [look(mapped, name) for name in layer_names(task)] == [0, 0, 0, 1, 1, 0]


def test_a_graph_gets_the_map_of_its_model() -> None:
    from planner.given import build_on_meta, source_of
    from planner.tracer import Tracer
    from tiny_models import CONFIGS

    config = CONFIGS["llama"]()
    source, _ = source_of(config, hub=False, revision=None, trust_remote_code=False)
    hardware = Hardware.from_options("2x1GB")
    tracer = Tracer(source, None, WORK, "bfloat16", False, use_cache=False, report=lambda text: None, hardware=hardware)
    graph, _ = tracer.trace(routed=True)
    of_graph = Task(graph=graph, hardware=hardware, workload=WORK)
    of_model = dataclasses.replace(of_graph, model=build_on_meta(source, "bfloat16"))
    whole, layer = graph.weight_bytes, graph.kind_of(1).nbytes
    met = set()
    for kind in ("auto", "sequential"):
        for caps in ([whole, whole], [3 * layer, 2 * layer], [2 * layer, layer], [0, 0]):
            max_memory: dict[int | str, int] = {0: caps[0], 1: caps[1], "cpu": 3 * layer}
            wheres = [peers.wheres_of(task, peers.device_map(task, kind, max_memory)) for task in (of_graph, of_model)]
            assert wheres[0] == wheres[1]
            met.update(wheres[0])
    assert {where.home for where in met} == {"cuda:0", "cuda:1", "cpu", "disk"}


def test_accelerate_overfills_unless_told_to_leave_room() -> None:
    """By hand: its half, the embedding and three blocks, takes 37 MiB and what runs beside it 26; there are 60."""
    task = task_of(chain(6), [60 * MIB, 70 * MIB])
    plain = peers.score(task, peers.accelerate_peer("auto"))
    told = peers.score(task, peers.accelerate_peer("auto", told=True))
    assert plain.simulated_ns is None
    assert "overfills" in (plain.why or "")
    assert told.simulated_ns is not None


# Greedy


def test_greedy_fills_by_exact_bytes() -> None:
    """By hand: an attention group of 4 MiB takes 4, one of 8 takes 8: 12 a block; both are below 10 MiB."""
    whole = task_of(chain(4), [FIXED + 25 * MIB + 512, FIXED + 25 * MIB + 512])
    assert run_on(whole, peers.greedy(whole)) == ["cuda:0"] * 3 + ["cuda:1"] * 3
    one_byte_less = task_of(chain(4), [FIXED + 25 * MIB - 1, 10**9])
    assert run_on(one_byte_less, peers.greedy(one_byte_less)).count("cuda:0") < 3


def test_greedy_waits_in_host_memory_and_then_on_disk() -> None:
    # One GPU: the ends (2 MiB), two slots of 8 MiB, and one block of 12 MiB.
    task = task_of(chain(5), [FIXED + 2 * MIB + 16 * MIB + 13 * MIB], cpu=42 * MIB)
    homes: dict[str, set[str]] = {}
    for entry in peers.greedy(task):
        homes.setdefault(entry.layer, set()).add(entry.home)
        assert entry.run_on == "cuda:0"
    # Host memory: two blocks of 12 MiB, and 16 MiB through which the disk's pass.
    assert [homes[f"layers.{i}"] for i in range(5)] == [{"cuda:0"}, {"cpu"}, {"cpu"}, {"disk"}, {"disk"}]


@given(st.integers(0, 40), st.integers(-1, 40))
def test_the_most_that_fits(limit: int, largest: int) -> None:
    expected = None if largest < 0 else min(largest, limit)
    assert peers._most(limit, lambda number: number <= largest) == expected


# All of them


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Draw a chain and a machine with none to two GPUs, of which most hold only a part of it."""
    sizes = st.sampled_from([MIB, 5 * MIB, 12 * MIB, 30 * MIB])
    graph = chain(draw(st.integers(1, 5)), block=draw(sizes), end=draw(sizes), ties=draw(st.booleans()))
    share = st.sampled_from([0, 30, 60, 90, 110, 300])
    gpus = [FIXED + graph.weight_bytes * draw(share) // 100 for _ in range(draw(st.integers(0, 2)))]
    return task_of(graph, gpus, cpu=graph.weight_bytes * draw(share) // 100, disk=graph.weight_bytes * draw(share))


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(tasks())
def test_no_peer_costs_less_than_what_is_proven(task: Task) -> None:
    try:
        solver = find(task.graph, task.hardware, task.workload)[2]
    except InfeasibleError:
        solver = None
    for name, peer in peers.PEERS.items():
        if peers.score(task, peer).simulated_ns is None:
            continue
        assert solver is not None, f"{name} has a map where nothing fits"
        placements = peer(task)
        slots = memory.needed_slots(task.graph, task.hardware, placements)
        price = cost.objective_ns(task.graph, task.hardware, task.workload, placements, slots)
        assert solver.bound_ns <= price, name


@pytest.mark.parametrize("seed", range(3))
def test_peers_answer_on_random_graphs_with_plans_that_hold(seed: int) -> None:
    graph = random_graphs.random_graph(seed, 30)
    task = Task(graph=graph, hardware=random_graphs.random_machine(seed, graph, 4), workload=random_graphs.WORKLOAD)
    scores = peers.scores(task)
    assert set(scores) == set(peers.PEERS)
    assert scores["greedy by layer"].simulated_ns is not None
    for name, score in scores.items():
        assert (score.simulated_ns is None) == (score.why is not None)
        if score.simulated_ns is None:
            continue
        plan = peers.plan_of(task, peers.PEERS[name](task))
        assert verify_plan(plan) == ()
        assert simulate.run(plan).total_ns == score.simulated_ns


def test_a_peer_that_fails_is_a_reason() -> None:
    def broken(task: Task) -> tuple[object, ...]:
        raise KeyError("what")

    score = peers.score(task_of(chain(1), [10**9]), broken)  # type: ignore[arg-type]
    assert score == peers.Score(simulated_ns=None, why="it failed: KeyError: 'what'")


# Random graphs


@pytest.mark.parametrize(("seed", "nodes"), [(0, 2), (1, 9), (2, 200)])
def test_random_graphs_are_connected_and_reproducible(seed: int, nodes: int) -> None:
    graph = random_graphs.random_graph(seed, nodes)
    assert graph == random_graphs.random_graph(seed, nodes)
    assert graph != random_graphs.random_graph(seed + 1, nodes)
    assert LayerGraph.from_dict(json.loads(graph.to_json())) == graph
    assert {edge.source for edge in graph.edges} == set(range(nodes - 1))
    assert {edge.target for edge in graph.edges} == set(range(1, nodes))
    pairs = [(edge.source, edge.target) for edge in graph.edges]
    assert len(set(pairs)) == len(pairs)
    if nodes > 100:
        assert any(target != source + 1 for source, target in pairs)


def test_random_machines_hold_the_weights_and_little_more() -> None:
    graph = random_graphs.random_graph(5, 200)
    hardware = random_graphs.random_machine(5, graph, 6)
    assert hardware == random_graphs.random_machine(5, graph, 6)
    work = max(memory.activation_bytes(graph))
    room = 0
    for device in hardware.gpus:
        context, workspace = memory.fixed_bytes(graph, device)
        room += hardware.pool(device.pool).usable_bytes - context - workspace - work
    assert graph.weight_bytes < room < 1.2 * graph.weight_bytes
    assert len({device.bytes_per_s for device in hardware.gpus}) > 1
    assert len({link.bytes_per_s for link in hardware.links if "cuda" in link.source and "cuda" in link.target}) > 1


# The benchmark's verdicts


def row(**changes: object) -> placement.Row:
    good: dict[str, object] = {
        "case": "a", "status": "optimal", "gap": 0.0, "wall_s": 0.1, "objective_ns": 1000, "simulated_ns": 1000,
        "peers": {"slow": 2000, "none": None}, "why": {"none": "too large"}, "broken": [],
    }  # fmt: skip
    return placement.Row(**(good | changes))  # type: ignore[arg-type]


NO_PLAN = dict.fromkeys(("status", "gap", "wall_s", "objective_ns", "simulated_ns"))


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, set()),
        ({"status": "feasible", "gap": 0.009}, set()),
        ({"status": "feasible", "gap": 0.011}, {"a"}),
        ({"wall_s": 0.4}, {"a"}),
        ({"simulated_ns": 1021}, {"objective"}),
        ({"simulated_ns": 979}, {"objective"}),
        ({"simulated_ns": 2001, "objective_ns": 2001}, {"never"}),
        ({"broken": ["cuda:0 is too full"]}, {"verify"}),
        ({**NO_PLAN, "error": "nothing fits"}, {"a", "plan"}),
        ({**NO_PLAN, "error": "nothing fits", "peers": {"slow": None}}, {"a"}),
    ],
)
def test_targets_are_missed_one_by_one(changes: dict[str, object], missed: set[str]) -> None:
    case = placement.Case(name="a", task=lambda: task_of(chain(1), []), within_s=0.3, most_gap=0.01)
    found = placement.targets([case], [row(**changes)])
    words = {"a": "a: within", "objective": "objective", "never": "never", "plan": "a plan", "verify": "verify"}
    expected = {entry.target for entry in found if any(entry.target.startswith(words[name]) for name in missed)}
    assert {entry.target for entry in found if entry.holds is False} == expected
    assert len(expected) == len(missed)


def test_a_target_that_no_row_speaks_of_is_not_held() -> None:
    case = placement.Case(name="a", task=lambda: task_of(chain(1), []))
    found = placement.targets([case], [row(**NO_PLAN, peers={"slow": None}, error="no such model")])
    assert [entry.holds for entry in found] == [None] * 4


def test_a_case_that_cannot_be_asked_is_a_row() -> None:
    def ask() -> Task:
        raise RuntimeError("no such model")

    made = placement.row_of(placement.Case(name="a", task=ask), with_plan=True)
    assert made.error == "RuntimeError: no such model"


def test_a_case_that_nothing_fits_is_a_row_with_the_peers() -> None:
    made = placement.row_of(
        placement.Case(name="a", task=lambda: task_of(chain(2), [1], cpu=1, disk=0)), with_plan=True
    )
    assert (made.error or "").startswith("InfeasibleError: ")
    assert set(made.peers) == set(peers.PEERS)
    assert set(made.peers.values()) == {None}


def test_a_case_without_an_answer_is_a_row_with_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(case: placement.Case, part: str) -> placement.Row:
        if part == "all":
            raise placement._NoRowError("no answer within 1 s")
        return row(**NO_PLAN)

    monkeypatch.setattr(placement, "_made_apart", made)
    found = placement.row_apart(placement.CASES[0])
    assert found == row(**NO_PLAN, error="no answer within 1 s")


def test_the_table_is_narrow() -> None:
    rows = [row(case="x" * 33, peers={"accelerate sequential, told to leave room": 2000}), row(error="y" * 300)]
    assert max(len(line) for line in placement.table(rows).splitlines()) <= 100


def test_names_of_cases_differ() -> None:
    names = [case.name for case in placement.CASES]
    assert len(set(names)) == len(names)
