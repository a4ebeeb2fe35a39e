"""Experts of different popularity: the file, what it makes of a graph, and placements against brute force."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import planner
from brute_force import Ledger
from drawn_cases import chains, check_against_brute_force, examples, networks
from planner import cost, memory
from planner.commands.main import main
from planner.errors import InputError, PlanFormatError
from planner.graph import Bucket, LayerGraph, LayerKind
from planner.placement import solution
from planner.placement.problem import build
from planner.placement.tables import share_out
from planner.plan import Plan
from planner.popularity import MOST_BUCKETS, Popularity, Routed
from planner.rules import Rules
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

SEEDS = range(24)


def moe_graph(
    *, blocks: int = 2, slices: int = 4, used: int = 1, size: int = 6 * MIB, whole: int = 3 * MIB, batch: int = 1
) -> LayerGraph:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    groups = (group("attn", whole), group("experts", size, slices=slices, used=used))
    kinds.append(LayerKind(name="Block", groups=groups))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**9, moved=10**6)] * 3
    order = [("embed", 0), *[(f"block.{number}", 2) for number in range(blocks)], ("head", 1)]
    return build_graph(kinds, [ends, ends, work], order, batch_size=batch)


def counts_for(graph: LayerGraph, rng: random.Random) -> dict[str, list[int]]:
    """Return counts for most layers with experts, of very different sizes, with ties and experts never used."""
    found = {}
    for layer in graph.layers:
        for entry in graph.kinds[layer.kind].groups:
            if entry.slices > 1 and rng.random() < 0.9:
                found[layer.name] = [rng.choice([0, 1, 1, 5, 40, 1000]) for _ in range(entry.slices)]
                found[layer.name][rng.randrange(entry.slices)] += 1
    return found


def skewed(graph: LayerGraph, rng: random.Random) -> LayerGraph:
    found = counts_for(graph, rng)
    return Popularity(layers=tuple(Routed(layer=name, counts=tuple(found[name])) for name in sorted(found))).on(graph)


def moe_case(seed: int) -> Case:
    """Return two or three blocks with experts on one or two GPUs that are too small for them."""
    rng = random.Random(seed)
    two = seed % 3 == 0
    batch, never_on_disk = rng.choice([1, 4]), two or rng.random() < 0.7
    graph = moe_graph(
        blocks=2 if two or not never_on_disk else rng.choice([2, 3]), slices=4, used=rng.choice([1, 2]), batch=batch,
        size=rng.choice([MIB, 6 * MIB]), whole=rng.choice([MIB, 8 * MIB]),
    )  # fmt: skip
    gpus = [gpu(number, product="big", flops=10**14, rate=10**12) for number in range(1 + two)]
    least = (graph.weight_bytes - 2 * MIB) // (1 + two)
    sizes = {device.name: 30 * MIB + rng.randint(least // 4, least) for device in gpus}
    if two and rng.random() < 0.5:
        sizes["cuda:1"] = sizes["cuda:0"]
    host = graph.weight_bytes * rng.choice([1, 3]) // 2 + 8 * MIB
    hardware = machine(gpus, {**sizes, "cpu": host, "disk": 0 if two else 2**30})
    if rng.random() < 0.7:
        slow = [
            dataclasses.replace(device, bytes_per_s=10**9, flops_per_s={"default": 10**10}) if device.kind == "cpu"
            else device
            for device in hardware.devices
        ]  # fmt: skip
        hardware = dataclasses.replace(hardware, devices=tuple(slow))
    work = Workload(
        prompt_tokens=8, new_tokens=rng.choice([2, 20]), batch_size=batch, objective=rng.choice(["latency", "tpot"])
    )
    rules = Rules(never_on_disk=never_on_disk, cpu_experts=rng.random() < 0.6)
    return Case(skewed(graph, rng), hardware, work, rules)


# Placements


@pytest.mark.parametrize("seed", SEEDS)
def test_placements_of_skewed_experts_are_as_good_as_brute_force_finds(seed: int) -> None:
    case = moe_case(seed)
    assert any(entry.buckets for kind in case.graph.kinds for entry in kind.groups)
    check_against_brute_force(case)


@examples(20)
@given(case=chains(gpus=("one", "alike")), seed=st.integers(0, 10**6))
def test_drawn_chains_with_skewed_experts(case: Case, seed: int) -> None:
    assume(any(entry.slices > 1 for layer in case.graph.layers for entry in case.graph.kinds[layer.kind].groups))
    graph = skewed(case.graph, random.Random(seed))
    check_against_brute_force(dataclasses.replace(case, graph=graph))


@examples(20)
@given(case=networks(), seed=st.integers(0, 10**6))
def test_drawn_graphs_with_skewed_experts(case: Case, seed: int) -> None:
    assume(any(entry.slices > 1 for layer in case.graph.layers for entry in case.graph.kinds[layer.kind].groups))
    graph = skewed(case.graph, random.Random(seed))
    check_against_brute_force(dataclasses.replace(case, graph=graph), named=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_cost_equals_that_of_independent_formulas(seed: int) -> None:
    case = moe_case(seed)
    ledger, rng = Ledger(case), random.Random(seed)
    for column in rng.sample(range(ledger.size), k=20):
        single = rng.choice(ledger.singles)
        placements = ledger.placements(column)
        slots = memory.needed_slots(case.graph, case.hardware, placements, single=single)
        found = cost.objective_ns(case.graph, case.hardware, case.workload, placements, slots)
        assert found == ledger.cost[single][column]


def test_the_tables_prove_many_of_these_by_themselves_and_experts_wait_in_most() -> None:
    """Else the cases would say little of what they are for."""
    proven, waits, partly = 0, 0, 0
    for seed in SEEDS:
        case = moe_case(seed)
        problem = build(case.graph, case.hardware, case.workload, case.rules, named=False)
        share = share_out(problem)
        filled = share and solution._by_tables(problem, share)
        proven += bool(share and filled and filled.objective == share.bound_ns)
        if Ledger(case).best() is None:
            continue
        plan = plan_of(case, predicted=False)
        kept = [p.resident_slices for p in plan.placements if p.resident_slices is not None and p.home != p.run_on]
        waits += bool(kept)
        partly += any(0 < stay < 4 for stay in kept if stay is not None)
    assert proven > len(SEEDS) // 3
    assert waits > len(SEEDS) // 2
    assert partly > len(SEEDS) // 4


@pytest.mark.parametrize("seed", SEEDS)
def test_two_kinds_of_experts_get_a_bound_that_holds(seed: int) -> None:
    """Experts of two sizes and curves: which of them should wait first depends on more than their price."""
    rng = random.Random(seed)
    whole = rng.choice([MIB, 9 * MIB])
    graph = moe_graph(blocks=2, slices=3, size=rng.choice([MIB, 6 * MIB]), whole=whole)
    large = (group("attn", whole), group("experts", rng.choice([3, 12]) * MIB, slices=4, used=2))
    layers = (*graph.layers[:2], dataclasses.replace(graph.layers[2], kind=3), graph.layers[3])
    graph = dataclasses.replace(graph, kinds=(*graph.kinds, LayerKind(name="Large", groups=large)), layers=layers)
    if seed % 2:
        found = Popularity.of({"block.0": [5, 4, 0], "block.1": [6, 5, 4, 0]})
        assert found is not None
        graph = found.on(graph)
    else:
        graph = skewed(graph, rng)
    case = streaming_case(graph, part=rng.choice([30, 50, 60, 70, 80]), flops=rng.choice([3 * 10**10, 10**14]))
    problem = build(case.graph, case.hardware, case.workload, case.rules, named=False)
    share, best = share_out(problem), Ledger(case).best()
    assert share is not None
    assert best is not None
    assert share.bound_ns <= best
    check_against_brute_force(case, always_optimal=False)


@pytest.mark.parametrize("part", range(20, 100, 4))
def test_experts_that_are_never_used_let_other_copies_overlap(part: int) -> None:
    """What waits and is not copied holds up no prefetched copy: the tables' bound must know."""
    graph = moe_graph(blocks=3, size=2 * MIB, whole=9 * MIB)
    popularity = Popularity.of({f"block.{number}": [6, 0, 5, 0] for number in range(3)})
    assert popularity is not None
    case = streaming_case(popularity.on(graph), part=part, flops=3 * 10**10)
    share = share_out(build(case.graph, case.hardware, case.workload, case.rules, named=False))
    best = Ledger(case).best()
    assert share is not None
    assert best is not None
    assert share.bound_ns <= best
    check_against_brute_force(case)


def streaming_case(graph: LayerGraph, *, part: int = 50, flops: int = 10**14) -> Case:
    """Return a case where a GPU has memory for part (percent) of the weights; others wait in host memory, and experts
    are copied when they are routed to.
    """
    gpus = [gpu(0, product="big", flops=flops, rate=10**12)]
    size = 30 * MIB + graph.weight_bytes * part // 100
    hardware = machine(gpus, {"cuda:0": size, "cpu": 2 * graph.weight_bytes, "disk": 0})
    slow = tuple(dataclasses.replace(d, bytes_per_s=10**7) if d.kind == "cpu" else d for d in hardware.devices)
    hardware = dataclasses.replace(hardware, devices=slow)
    work = Workload(prompt_tokens=8, new_tokens=50, batch_size=graph.batch_size)
    return Case(graph, hardware, work, Rules(cpu_experts=False, never_on_disk=True))


EVEN = {f"block.{number}": [7, 7, 7, 7, 7, 7] for number in range(3)}
SKEWED = {"block.0": [50, 1, 9, 20, 3, 9], "block.1": [0, 8, 0, 16, 1, 99], "block.2": [5, 4, 3, 2, 1, 60]}


def place(case: Case, popularity: Any = None) -> Plan:
    return planner.place(case.graph, case.hardware, case.workload, case.rules, popularity=popularity)


def test_even_counts_give_the_plan_that_no_counts_give() -> None:
    case = streaming_case(moe_graph(blocks=3, slices=6, used=2))
    plain, even = place(case), place(case, EVEN)
    assert even.assumptions[0].startswith("experts are equally popular (as was given)")
    assert dataclasses.replace(even, assumptions=plain.assumptions) == plain
    assert dataclasses.replace(even, assumptions=plain.assumptions).to_json() == plain.to_json()


@pytest.mark.parametrize("used", [1, 2, 3])
def test_skew_costs_less_where_experts_wait(used: int) -> None:
    case = streaming_case(moe_graph(blocks=3, slices=6, used=used))
    even, uneven = place(case), place(case, SKEWED)
    assert even.solver is not None
    assert uneven.solver is not None
    assert any(0 < (p.resident_slices or 0) < 6 for p in uneven.placements)
    assert (even.solver.status, uneven.solver.status) == ("optimal", "optimal")
    assert uneven.solver.objective_ns < even.solver.objective_ns


def test_the_simulator_counts_what_the_planner_counts() -> None:
    for popularity in (None, SKEWED):
        plan = place(streaming_case(moe_graph(blocks=3, slices=6, used=2, whole=1024)), popularity)
        assert plan.solver is not None
        assert plan.prediction is not None
        assert plan.prediction.total_ns == pytest.approx(plan.solver.objective_ns, rel=0.001)


def test_more_layers_of_many_experts_are_counted_as_fast_as_alike_ones() -> None:
    """Sixty layers of 256 experts: one class, and proven by the tables."""
    graph = moe_graph(blocks=60, slices=256, used=8, size=MIB)
    rng = random.Random(0)
    popularity = {
        f"block.{number}": rng.sample([int(10**6 / (rank + 3)) for rank in range(256)], k=256) for number in range(60)
    }
    case = streaming_case(graph)
    plan = place(case, popularity)
    assert plan.solver is not None
    assert plan.solver.status == "optimal"
    assert verify_plan(plan) == ()
    problem = build(plan.graph, case.hardware, case.workload, case.rules, named=False)
    assert len(problem.blocks) == 1
    assert len({layer.ranking for layer in plan.graph.layers}) == 61
    kept = [placement.resident_slices for placement in plan.placements if placement.resident_slices is not None]
    assert 0 < min(kept) <= max(kept) <= min(kept) + 1 < 256


# The graph


def test_chances_are_in_proportion_and_add_up() -> None:
    graph = Popularity.of({"block.0": [50, 20, 30, 0]}).on(moe_graph(blocks=1, used=2))  # type: ignore[union-attr]
    found = graph.kinds[2].group("experts")
    assert graph.layers[1].ranking == (0, 2, 1, 3)
    assert [(bucket.slices, bucket.chance) for bucket in found.buckets] == [(1, 1.0), (1, 0.6), (1, 0.4), (1, 0.0)]
    assert found.expected_slices(3) == pytest.approx(1 + 1 - 0.4**3 + 1 - 0.6**3)
    assert list(found.waiting(3)) == [(1, found.buckets[3]), (1, found.buckets[2]), (1, found.buckets[1])]


def test_no_token_uses_an_expert_twice() -> None:
    """Of 98 % of all routings a half is all that one expert can have: others get what is beyond."""
    for counts, expected in (([98, 1, 1, 0], [1, 0.5, 0.5, 0]), ([5, 0, 0, 0], [1, 1 / 3, 1 / 3, 1 / 3])):
        graph = Popularity.of({"block.0": counts}).on(moe_graph(blocks=1, used=2))  # type: ignore[union-attr]
        graph.check()
        buckets = graph.kinds[2].group("experts").buckets
        assert [bucket.chance for bucket in buckets for _ in range(bucket.slices)] == pytest.approx(expected)


def test_one_curve_is_the_mean_of_sorted_layers() -> None:
    popularity = Popularity.of({"block.0": [1, 2, 3, 4], "block.1": [4, 4, 1, 1]})
    assert popularity is not None
    graph = popularity.on(moe_graph(blocks=3))
    # Of the third layer nothing is known: a quarter each.
    expected = [(0.4 + 0.4 + 0.25) / 3, (0.3 + 0.4 + 0.25) / 3, (0.2 + 0.1 + 0.25) / 3, (0.1 + 0.1 + 0.25) / 3]
    assert [bucket.chance for bucket in graph.kinds[2].group("experts").buckets] == pytest.approx(expected)
    assert [layer.ranking for layer in graph.layers] == [(), (3, 2, 1, 0), (), (), ()]
    assert "equally popular where nothing was given: block.2" in popularity.note(graph)


@examples(60)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40), st.integers(1, 40), st.integers(1, 9))
def test_steps_keep_the_sum_and_the_order(counts: list[int], used: int, times: int) -> None:
    assume(any(counts) and used <= len(counts))
    plain = moe_graph(blocks=1, slices=len(counts), used=used)
    graph, again = (
        Popularity(layers=(Routed(layer="block.0", counts=tuple(count * many for count in counts)),)).on(plain)
        for many in (1, times)
    )
    graph.check()
    assert graph == again
    assert len(graph.kinds[2].group("experts").buckets) <= MOST_BUCKETS
    ranked = [counts[expert] for expert in graph.layers[1].ranking or range(len(counts))]
    if graph.kinds[2].group("experts").buckets:
        assert ranked == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    "change",
    [
        {"buckets": (Bucket(slices=4, chance=0.2),)},
        {"buckets": (Bucket(slices=3, chance=0.25), Bucket(slices=2, chance=0.125))},
        {"buckets": (Bucket(slices=2, chance=0.1), Bucket(slices=2, chance=0.4))},
        {"buckets": (Bucket(slices=2, chance=0.6), Bucket(slices=2, chance=-0.1))},
        {"buckets": (Bucket(slices=2, chance=0.5), Bucket(slices=0, chance=0.2), Bucket(slices=2, chance=0.0))},
        {"ranking": (0, 1, 2)},
        {"ranking": (0, 1, 2, 2)},
        {"ranking": (1, 2, 3, 4)},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_graphs_plans_and_verify(change: dict[str, Any]) -> None:
    plan = place(streaming_case(moe_graph()), {"block.0": [4, 3, 2, 1]})
    graph = plan.graph
    if "ranking" in change:
        layers = [dataclasses.replace(graph.layers[1], **change), *graph.layers[2:]]
        graph = dataclasses.replace(graph, layers=(graph.layers[0], *layers))
    else:
        kind = graph.kinds[2]
        groups = (kind.groups[0], dataclasses.replace(kind.groups[1], **change))
        graph = dataclasses.replace(graph, kinds=(*graph.kinds[:2], dataclasses.replace(kind, groups=groups)))
    broken = dataclasses.replace(plan, graph=graph)
    assert verify_plan(plan) == ()
    assert [violation.rule for violation in verify_plan(broken)] == ["graph"]
    with pytest.raises(PlanFormatError, match=r"block\.0|Block\.experts"):
        Plan.from_json(broken.to_json())
    with pytest.raises(PlanFormatError):
        LayerGraph.from_json(graph.to_json())


def test_plans_with_rankings_come_back_and_others_do_not_mention_them() -> None:
    case = streaming_case(moe_graph())
    plan = place(case, {"block.1": [1, 2, 3, 4]})
    assert Plan.from_json(plan.to_json()) == plan
    assert '"ranking"' in plan.to_json()
    plain = place(case)
    assert '"ranking"' not in plain.to_json()
    assert '"buckets"' not in plain.to_json()
    assert Plan.from_json(plain.to_json()) == plain


# What is given


def test_the_order_of_layers_changes_nothing(tmp_path: Path) -> None:
    case = streaming_case(moe_graph(blocks=3, slices=6))
    turned = dict(reversed(SKEWED.items()))
    path = tmp_path / "counts.json"
    Popularity.of(turned).save(path)  # type: ignore[union-attr]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"layers": turned, "schema_version": 1}))
    plans = {place(case, given).to_json() for given in (SKEWED, turned, path, str(other), Popularity.of(turned))}
    assert len(plans) == 1
    assert Popularity.load(path) == Popularity.load(other) == Popularity.of(SKEWED)


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "popularity.md").read_text(encoding="utf-8")
    path = tmp_path / "counts.json"
    path.write_text(page.split("```json\n")[1].split("```")[0])
    found = Popularity.load(path)
    assert [(entry.layer, len(entry.counts)) for entry in found.layers] == [
        ("model.layers.0", 8),
        ("model.layers.1", 8),
    ]
    assert f"at most {MOST_BUCKETS} steps" in page


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"block.9": [1, 2, 3, 4]}, r"'block\.9' is no layer of Small; layers with experts are 'block\.0', 'block\.1'"),
        ({"head": [1, 2]}, r"'head' has no experts in Small; layers with experts are 'block\.0'"),
        ({"block.0": [1, 2, 3]}, r"'block\.0' has 4 experts, and 3 counts were given"),
        ({"block.0": [1, -2, 3, 4]}, r"expert 1 of block\.0 has the count -2"),
        ({"block.0": [1, math.nan, 3, 4]}, "expert 1 of block.0 has the count nan"),
        ({"block.0": [1, math.inf, 3, 4]}, "expert 1 of block.0 has the count inf"),
        ({"block.0": [1, True, 3, 4]}, "expert 1 of block.0 has the count True"),
        ({"block.0": [0, 0, 0, 0]}, r"block\.0 routed to none of its 4 experts; leave the layer out"),
        ({"block.0": "1234"}, r"block\.0 must hold a list of counts"),
        ({}, "there are no layers in it"),
    ],
    ids=str,
)
def test_counts_that_cannot_be_are_named(counts: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        place(streaming_case(moe_graph()), counts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read the popularity of experts in .*counts\.json: No such file"),
        ("{", r"counts\.json is not JSON"),
        ("[" * 100_000, r"counts\.json is not JSON"),
        ("[1]", r'must hold \{"schema_version": 1, "layers"'),
        ('{"schema_version": 1}', r'must hold \{"schema_version": 1, "layers"'),
        ('{"schema_version": 2, "layers": {"a": [1]}}', "is of version 2"),
        ('{"schema_version": 1, "layers": [1]}', "must hold"),
        ('{"schema_version": 1, "layers": {"a": 1}}', "a must hold a list of counts"),
        ('{"schema_version": 1, "layers": {"a": ["x", 1]}}', "expert 0 of a has the count 'x'"),
    ],
    ids=str,
)
def test_files_that_cannot_be_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "counts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Popularity.load(path)


def test_layers_without_experts_are_said_to_be_none() -> None:
    graph = build_graph([end_kind("Only", MIB)], [[span()]], [("only", 0)])
    with pytest.raises(InputError, match="none of its layers has experts"):
        Popularity.of({"layer": [1]}).on(graph)  # type: ignore[union-attr]


# The command


def test_the_command_takes_a_file_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADPLAN_CACHE", str(tmp_path / "cache"))
    path, out = tmp_path / "counts.json", tmp_path / "plan.json"
    asked = ["--model", "mistralai/Mixtral-8x7B", "--gpus", "1x24GB", "--prompt", "8", "--new-tokens", "4", "--quiet"]
    given = ["--experts-popularity", str(path), "--out", str(out)]
    counts = {f"model.layers.{number}": [9, 8, 7, 6, 5, 4, 3, number] for number in range(31)}
    path.write_text(json.dumps({"schema_version": 1, "layers": counts}))
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "equally popular" in told
    assert main([*asked, *given]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "experts are as popular as was given" in told
    assert "equally popular where nothing was given: model.layers.31" in told
    plan = Plan.load(out)
    assert verify_plan(plan) == ()
    assert plan.graph.layers[5].ranking == (0, 1, 2, 3, 4, 5, 7, 6) or plan.graph.layers[5].ranking == ()
    assert main([*asked, *given]) == 0
    assert Plan.load(out) == plan
    assert main(["explain", str(out), "--time-limit", "1", "--quiet"]) == 0
    assert "Experts are as popular as was given" in " ".join(capsys.readouterr().out.split())
    path.write_text(json.dumps({"schema_version": 1, "layers": {"model.layers.0": [1, 2]}}))
    assert main([*asked, *given]) == 2
    assert "'model.layers.0' has 8 experts, and 2 counts were given" in capsys.readouterr().err
    assert main([*asked, "--experts-popularity", str(path), "--out", str(path)]) == 2
    assert "would overwrite what is read" in capsys.readouterr().err
