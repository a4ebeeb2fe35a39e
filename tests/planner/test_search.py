"""Searches around the solver against trying everything, on small graphs whose needs follow formulas of the tests'."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import planner
from planner import api, search
from planner.commands import frontier as table
from planner.commands.main import main
from planner.errors import InfeasibleError, InputError, NoSolutionInTimeError
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware
from planner.placement.solution import find
from planner.plan import Plan
from planner.rules import NO_RULES, Pin, Rules, Sensitivity
from planner.verify import verify_plan
from planner.workload import Objective, Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span
from tiny_models import CONFIGS

EXAMPLES = settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
BLOCKS = 4
GPU = gpu(0, product="a", flops=10**12, rate=10**11)


class Asked:
    """A question whose graph is a formula of the work; it counts what is traced, and may fail from one size on."""

    def __init__(self, build: Callable[[Workload], LayerGraph], *, positions: int | None = None):
        self.build, self.known = build, positions
        self.traced: list[Workload] = []
        self.stop_after: int | None = None

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> Plan:
        assert workload.objective in ("latency", "ttft", "tpot", "fit")
        if workload not in self.traced:
            if self.stop_after == len(self.traced):
                raise NoSolutionInTimeError("cut off")
            self.traced.append(workload)
        plan = plan_of(Case(graph=self.build(workload), hardware=hardware, workload=workload))
        return dataclasses.replace(plan, rules=rules, prediction=None)

    def graph(self, hardware: Hardware, workload: Workload) -> LayerGraph:
        assert workload in self.traced
        return self.build(workload)

    def positions(self) -> int | None:
        return self.known

    def fits(self, hardware: Hardware, workload: Workload) -> bool:
        try:
            find(self.build(workload), hardware, workload, NO_RULES)
        except InfeasibleError:
            return False
        return True


def formula(
    *, token: int = 40_000, activation: int = 9_000, square: int = 0, weights: int = 3 * MIB, flops: int = 10**6
) -> Callable[[Workload], LayerGraph]:
    """Return graphs whose every block keeps `token` bytes a token, and holds `activation` a token, more with the square
    of the prompt.
    """
    kinds = [
        end_kind("Embedding", MIB),
        LayerKind(name="Block", groups=(group("attn", weights), group("mlp", 2 * weights))),
        end_kind("Head", MIB),
    ]

    def build(work: Workload) -> LayerGraph:
        tokens, rows = work.prompt_tokens, work.rows
        # Sixteen tokens of cache are taken at a time: a line only roughly.
        kept = [rows * -(-(tokens + step) // 16) * 16 * token for step in (0, 1, work.decode_steps)]
        block = [
            span(
                kv=(0 if index == 0 else kept[index], kept[index]),
                peak=rows * ((tokens * activation + square * tokens * tokens) if index == 0 else activation),
                flops=rows * (tokens if index == 0 else 1) * flops,
                moved=3 * weights + kept[index],
                operators=10,
            )
            for index in range(3)
        ]
        ends = [[span(peak=rows * 1000, moved=MIB, operators=2)] * 3 for _ in range(2)]
        order = [("embed", 0), *((f"blocks.{index}", 1) for index in range(BLOCKS)), ("head", 2)]
        return build_graph(
            kinds, [ends[0], block, ends[1]], order, tokens=(tokens, tokens + 1), batch_size=work.batch_size
        )

    return build


def a_machine(gpu_bytes: int, host_bytes: int = 8 * MIB) -> Hardware:
    return machine([GPU], {"cuda:0": gpu_bytes, "cpu": host_bytes, "disk": 0})


def work(objective: Objective, **sizes: int) -> Workload:
    return Workload(**{"batch_size": 1, "prompt_tokens": 64, "new_tokens": 8, **sizes}, objective=objective)  # type: ignore[arg-type]


def rate(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.workload.rows * plan.workload.new_tokens / plan.prediction.total_ns


# The largest that fits.


@EXAMPLES
@given(
    gpu_bytes=st.integers(64 * MIB, 140 * MIB),
    token=st.sampled_from([7_000, 40_000, 120_000]),
    square=st.sampled_from([0, 0, 3]),
    floor=st.integers(1, 3),
)
@example(gpu_bytes=110 * MIB, token=2_000, square=0, floor=1)
@example(gpu_bytes=110 * MIB, token=4_000, square=3, floor=2)
def test_the_largest_batch_is_the_largest_of_all(gpu_bytes: int, token: int, square: int, floor: int) -> None:
    asked = Asked(formula(token=token, square=square))
    hardware = a_machine(gpu_bytes)
    wanted = work("max-batch", batch_size=floor, prompt_tokens=100)
    largest = floor - 1
    while asked.fits(hardware, dataclasses.replace(wanted, batch_size=largest + 1)):
        largest += 1
        if largest == 60:
            return
    if largest < floor:
        with pytest.raises(InfeasibleError):
            search.best(asked, hardware, wanted, NO_RULES, api.predict)
        return
    found = search.best(asked, hardware, wanted, NO_RULES, api.predict)
    assert found.finished
    assert found.plan.workload == dataclasses.replace(wanted, batch_size=largest)
    assert found.plan.solver is not None
    assert found.plan.prediction is not None
    assert verify_plan(found.plan) == ()
    assert f"fits: {largest:,}; the next one tried, {largest + 1:,}, is proven not to" in found.plan.assumptions[-1]
    assert len(asked.traced) <= 8


@EXAMPLES
@given(
    gpu_bytes=st.integers(64 * MIB, 250 * MIB),
    token=st.sampled_from([7_000, 20_000, 40_000]),
    square=st.sampled_from([0, 0, 3, 40]),
    floor=st.sampled_from([1, 64, 100]),
    positions=st.sampled_from([None, 1000, 4000]),
)
@example(gpu_bytes=100 * MIB, token=7_000, square=0, floor=1, positions=4000)
def test_the_longest_prompt_is_the_longest_of_all_steps(
    gpu_bytes: int, token: int, square: int, floor: int, positions: int | None
) -> None:
    asked = Asked(formula(token=token, square=square), positions=positions)
    hardware = a_machine(gpu_bytes)
    wanted = work("max-context", prompt_tokens=floor)
    end = (positions or 5000) - wanted.new_tokens
    sizes = [floor, *range((floor // 64 + 1) * 64, end, 64), end]
    fitting = list(
        itertools.takewhile(lambda n: asked.fits(hardware, dataclasses.replace(wanted, prompt_tokens=n)), sizes)
    )
    if not fitting:
        with pytest.raises(InfeasibleError):
            search.best(asked, hardware, wanted, NO_RULES, api.predict)
        return
    if positions is None and len(fitting) == len(sizes):
        return
    plan = search.best(asked, hardware, wanted, NO_RULES, api.predict).plan
    assert plan.workload.prompt_tokens == fitting[-1]
    assert len(asked.traced) <= 9
    assert verify_plan(plan) == ()
    if len(fitting) == len(sizes):
        assert f"of {positions:,} positions 8 are for the answer" in plan.assumptions[-1]


def test_the_plan_at_the_largest_is_the_fastest_there() -> None:
    asked = Asked(formula())
    hardware = a_machine(150 * MIB)
    plan = search.best(asked, hardware, work("max-batch"), NO_RULES, api.predict).plan
    alone = asked.plan(hardware, dataclasses.replace(plan.workload, objective="latency"), NO_RULES)
    assert (plan.placements, plan.slots, plan.solver) == (alone.placements, alone.slots, alone.solver)


def test_a_prompt_longer_than_the_model_knows_is_planned_as_it_is() -> None:
    asked = Asked(formula(token=500), positions=100)
    plan = search.best(asked, a_machine(300 * MIB), work("max-context", prompt_tokens=200), NO_RULES, api.predict).plan
    assert plan.workload.prompt_tokens == 200


def test_what_does_not_depend_on_the_prompt_has_no_longest_one() -> None:
    fixed = formula()(work("latency"))
    asked = Asked(lambda work: dataclasses.replace(fixed, batch_size=work.batch_size))
    with pytest.raises(InputError, match="does not depend on its prompt"):
        search.best(asked, a_machine(300 * MIB), work("max-context"), NO_RULES, api.predict)


def test_a_search_that_is_cut_off_says_so_and_gives_what_it_has() -> None:
    for objective in ("max-batch", "throughput"):
        asked = Asked(formula())
        asked.stop_after = 2
        found = search.best(asked, a_machine(200 * MIB), work(objective), NO_RULES, api.predict)
        assert not found.finished
        assert found.plan.assumptions[-1].startswith("the search was cut off")
        assert "proven not to fit" not in " ".join(found.plan.assumptions)
    asked.stop_after, asked.traced = 0, []
    with pytest.raises(NoSolutionInTimeError):
        search.best(asked, a_machine(200 * MIB), work("max-batch"), NO_RULES, api.predict)


def test_an_interrupt_ends_the_search_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(formula())
    real, calls = asked.plan, itertools.count()

    def plan(hardware: Hardware, workload: Workload, rules: Rules) -> Plan:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(hardware, workload, rules)

    monkeypatch.setattr(asked, "plan", plan)
    found = search.best(asked, a_machine(200 * MIB), work("throughput"), NO_RULES, api.predict)
    assert (found.finished, next(calls)) == (False, 4)
    assert found.plan.workload.batch_size in {entry.batch_size for entry in asked.traced}


def test_layers_left_to_the_cpu_are_told() -> None:
    asked = Asked(formula())
    hardware = a_machine(30 * MIB, 200 * MIB)
    plan = search.best(asked, hardware, work("max-batch"), NO_RULES, api.predict).plan
    number = plan.run_on().count("cpu")
    assert number
    assert f"{number} of 6 layers run on the CPU" in plan.assumptions[-1]
    alone = machine([], {"cpu": 200 * MIB, "disk": 0})
    assert "CPU" not in search.best(asked, alone, work("max-batch"), NO_RULES, api.predict).plan.assumptions[-1]


def test_experts_are_traced_by_route_where_all_together_do_not_fit() -> None:
    """Grouped products need room for every expert on the GPU; by route they may wait elsewhere."""
    options = {"gpus": "1x600MB", "ram": "5GB", "prompt_tokens": 13, "new_tokens": 6, "weight_dtype": "bfloat16"}
    plan = planner.plan_model(CONFIGS["mixtral"](), **options)
    assert plan.execution.experts == "loadplan_grouped"
    real = find

    def refuses(graph: LayerGraph, *rest: Any) -> Any:
        if graph == plan.graph:
            raise InfeasibleError(device="cuda:0", needed_bytes=1, available_bytes=0, smallest_fix="", message="")
        return real(graph, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.placement.solution.find", refuses)
        routed = planner.plan_model(CONFIGS["mixtral"](), **options, use_cache=False)
    assert routed.execution.experts == "loadplan_routed"


def test_the_time_limit_is_for_the_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(start=100, step=4)
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    limits = []
    asked = Asked(formula())
    real = asked.plan

    def plan(hardware: Hardware, workload: Workload, rules: Rules) -> Plan:
        limits.append(rules.time_limit_s)
        return real(hardware, workload, rules)

    monkeypatch.setattr(asked, "plan", plan)
    rules = Rules(time_limit_s=10)
    found = search.best(asked, a_machine(200 * MIB), work("max-batch"), rules, api.predict)
    assert (limits, found.finished, found.plan.rules) == ([6, 2], False, rules)


# Throughput.


@EXAMPLES
@given(
    gpu_bytes=st.integers(70 * MIB, 120 * MIB),
    host_bytes=st.sampled_from([8 * MIB, 60 * MIB]),
    token=st.sampled_from([20_000, 60_000]),
    weights=st.sampled_from([MIB, 4 * MIB]),
    floor=st.integers(1, 3),
)
def test_throughput_is_the_best_of_all_batches(
    gpu_bytes: int, host_bytes: int, token: int, weights: int, floor: int
) -> None:
    asked = Asked(formula(token=token, weights=weights))
    hardware = a_machine(gpu_bytes, host_bytes)
    wanted = work("throughput", batch_size=floor, prompt_tokens=40)
    rates = {}
    for batch in range(floor, 200):
        at = dataclasses.replace(wanted, batch_size=batch, objective="latency")
        if not asked.fits(hardware, at):
            break
        plan = asked.plan(hardware, at, NO_RULES)
        rates[batch] = rate(dataclasses.replace(plan, prediction=api.predict(plan)))
    asked.traced = []
    if not rates:
        with pytest.raises(InfeasibleError):
            search.best(asked, hardware, wanted, NO_RULES, api.predict)
        return
    plan = search.best(asked, hardware, wanted, NO_RULES, api.predict).plan
    batch = plan.workload.batch_size
    assert plan.workload.objective == "throughput"
    assert rate(plan) == rates[batch]
    # Nothing that was tried is better, neighbours are no better than a finer search would find, and where one batch
    # after the other does better up to one and worse from there, that one is found.
    assert all(rate(plan) >= rates.get(tried.batch_size, 0) for tried in asked.traced)
    near = max(1, batch // 32)
    order = [rates[size] for size in sorted(rates)]
    top = order.index(max(order))
    single = order[: top + 1] == sorted(order[: top + 1]) and order[top:] == sorted(order[top:], reverse=True)
    if single:
        assert abs(batch - max(rates, key=lambda size: rates[size])) <= near
    assert len(asked.traced) <= 22


def test_throughput_stops_growing_where_growing_does_not_pay() -> None:
    # Time grows with the square of the batch's work: more rows are never worth it.
    def build(work: Workload) -> LayerGraph:
        graph = formula(token=10, activation=10, weights=1024)(work)
        slow = tuple(
            dataclasses.replace(
                entry, spans=tuple(dataclasses.replace(s, operators=100 * work.batch_size**2) for s in entry.spans)
            )
            for entry in graph.passes
        )
        return dataclasses.replace(graph, passes=slow)

    asked = Asked(build)
    plan = search.best(asked, a_machine(300 * MIB), work("throughput"), NO_RULES, api.predict).plan
    assert plan.workload.batch_size == 1
    assert [entry.batch_size for entry in asked.traced] == [1, 2, 4, 8]


# Choices of caches.


@pytest.mark.parametrize("objective", ["latency", "ttft", "fit", "throughput", "max-batch", "max-context"])
def test_the_best_of_the_caches_allowed_is_taken(objective: Objective) -> None:
    sizes = {"dynamic": 20_000, "static": 60_000, "fp8": 9_000}
    asked = Asked(lambda work: formula(token=sizes[work.cache])(work), positions=4000)
    hardware = a_machine(100 * MIB)
    caches = ("dynamic", "static", "fp8")
    alone = {
        cache: search.best(
            asked, hardware, dataclasses.replace(work(objective), cache=cache), NO_RULES, api.predict
        ).plan
        for cache in caches
    }
    plan = search.best(asked, hardware, work(objective), Rules(caches=caches), api.predict).plan
    assert plan.workload == alone["fp8"].workload
    assert plan.placements == alone["fp8"].placements
    assert all(cache in plan.assumptions[-1] for cache in caches)


def test_a_cache_that_does_not_fit_is_passed_over_unless_none_does() -> None:
    asked = Asked(lambda work: formula(token=4_000_000 if work.cache == "static" else 1000)(work))
    hardware = a_machine(100 * MIB)
    static = dataclasses.replace(work("latency"), cache="static")
    plan = search.best(asked, hardware, static, Rules(caches=("static", "dynamic")), api.predict).plan
    assert plan.workload.cache == "dynamic"
    assert "static (does not fit)" in plan.assumptions[-1]
    with pytest.raises(InfeasibleError):
        search.best(asked, hardware, static, Rules(caches=("static",)), api.predict)


# Memory against time.


@pytest.mark.parametrize("objective", ["latency", "ttft", "tpot"])
def test_the_frontier_holds_only_what_nothing_dominates(objective: Objective) -> None:
    asked = Asked(formula(weights=8 * MIB))
    hardware = machine(
        [GPU, gpu(1, product="a", flops=10**12, rate=10**11)],
        {"cuda:0": 160 * MIB, "cuda:1": 160 * MIB, "cpu": 200 * MIB, "disk": 0},
    )
    points = search.frontier(asked, hardware, work(objective), NO_RULES, api.predict)
    assert len(points) > 2
    for one, two in itertools.pairwise(points):
        assert one.memory_bytes < two.memory_bytes
        assert one.time_ns > two.time_ns
    for point in points:
        assert verify_plan(point.plan) == ()
        assert point.plan.prediction is not None
        peaks = point.plan.prediction.peak_bytes
        assert point.memory_bytes == peaks["cuda:0"] + peaks["cuda:1"]
    # Every share was tried: whatever plan one has, a point of the frontier is as good.
    for share in range(13):
        caps = dict.fromkeys(("cuda:0", "cuda:1"), 160 * MIB * share // 12)
        pools = tuple(
            dataclasses.replace(pool, capacity_bytes=caps.get(pool.name, pool.capacity_bytes))
            for pool in hardware.pools
        )
        plan = asked.plan(dataclasses.replace(hardware, pools=pools), work(objective), NO_RULES)
        prediction = api.predict(plan)
        memory = prediction.peak_bytes["cuda:0"] + prediction.peak_bytes["cuda:1"]
        times = {"latency": prediction.total_ns, "ttft": prediction.prefill_ns, "tpot": prediction.decode_ns_per_token}
        assert any(p.memory_bytes <= memory and p.time_ns <= times[objective] for p in points), share
    assert search.frontier(asked, hardware, work(objective), NO_RULES, api.predict) == points
    text = table.render(points)
    assert max(map(len, text.splitlines())) <= 80
    assert len(json.loads(table.as_json(points))["frontier"]) == len(points)


def test_a_frontier_needs_something_to_trade() -> None:
    asked = Asked(formula())
    with pytest.raises(InputError, match="max-batch"):
        search.frontier(asked, a_machine(100 * MIB), work("max-batch"), NO_RULES, api.predict)
    with pytest.raises(InputError, match="no GPU"):
        search.frontier(asked, machine([], {"cpu": 99 * MIB, "disk": 0}), work("latency"), NO_RULES, api.predict)
    with pytest.raises(InfeasibleError):
        search.frontier(asked, a_machine(30 * MIB, MIB), work("latency"), NO_RULES, api.predict)


# Rules.


def test_rules_are_checked_against_what_there_is() -> None:
    graph, hardware = formula()(work("latency")), a_machine(100 * MIB)
    Rules(pins=(Pin(layers=r"blocks\.[0-2]", device="cuda:0"), Pin(layers="head", device="cpu"))).check(graph, hardware)
    with pytest.raises(InputError, match=r"'cuda:9'; there are cuda:0, cpu"):
        Rules(pins=(Pin(layers="head", device="cuda:9"),)).check(graph, hardware)
    with pytest.raises(InputError, match=r"'disk'"):
        Rules(pins=(Pin(layers="head", device="disk"),)).check(graph, hardware)
    with pytest.raises(InputError, match=r"no layer's whole name matches; there are 'blocks.0'.*'head'"):
        Rules(pins=(Pin(layers=r"block\.0", device="cpu"),)).check(graph, hardware)
    with pytest.raises(InputError, match="no layer"):
        Rules(pins=(Pin(layers="blocks", device="cpu"),)).check(graph, hardware)


def test_rules_refuse_values_that_mean_nothing() -> None:
    for wrong in (
        {"quality_budget": -1.0}, {"quality_budget": float("nan")}, {"time_limit_s": 0.0}, {"dtypes": ("int3",)},
        {"pins": (Pin(layers="(", device="cpu"),)},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Rules(**wrong)  # type: ignore[arg-type]
    for groups, dtype, loss in (("(", "int8", 1.0), (".*", "int3", 1.0), (".*", "int8", -1.0)):
        with pytest.raises(InputError):
            Sensitivity(groups=groups, dtype=dtype, loss=loss)


# With real models, and at the command line.


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_largest_batch_of_a_model(name: str) -> None:
    options = {"gpus": 0, "ram": "4040MB", "disk": 0, "prompt_tokens": 13, "new_tokens": 6, "weight_dtype": "float32"}
    plan = planner.plan_model(CONFIGS[name](), objective="max-batch", **options)
    size = plan.workload.batch_size
    assert size > 8
    assert verify_plan(plan) == ()
    assert planner.plan_model(CONFIGS[name](), batch_size=size, **options).placements == plan.placements
    with pytest.raises(InfeasibleError):
        planner.plan_model(CONFIGS[name](), batch_size=size + 1, **options)


def test_the_longest_prompt_ends_where_the_model_does() -> None:
    plan = planner.plan_model(CONFIGS["gpt2"](), gpus=0, new_tokens=24, objective="max-context")
    assert plan.workload.prompt_tokens == 1000
    assert "a prompt of at least 64 tokens (assumed)" in plan.assumptions


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["--model", "gpt2", *words])
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def test_options_make_rules(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    losses = tmp_path / "losses.json"
    losses.write_text('[{"groups": ".*mlp", "dtype": "int8", "loss": 0.25}]')
    words = (
        "--gpus", "1x24GB", "--pin", r"transformer\.h\.\d=0", "--pin", "lm_head=cpu", "--never-disk", "--one-node",
        "--contiguous", "--no-cpu-experts", "--dtype", "bf16,int8", "--quality-budget", "2", "--sensitivity",
        str(losses), "--cache", "dynamic,fp8", "--prefill-chunk", "none,256", "--objective", "ttft",
    )  # fmt: skip
    code, out, err = ask(capsys, *words, "--json")
    assert (code, err) == (0, "")
    plan = Plan.from_json(out)
    assert plan.workload.objective == "ttft"
    assert plan.rules == Rules(
        pins=(Pin(layers=r"transformer\.h\.\d", device="cuda:0"), Pin(layers="lm_head", device="cpu")),
        never_on_disk=True,
        never_across_nodes=True,
        contiguous=True,
        cpu_experts=False,
        dtypes=("int8",),
        caches=("dynamic", "fp8"),
        prefill_chunks=(None, 256),
        quality_budget=2.0,
        sensitivity=(Sensitivity(groups=".*mlp", dtype="int8", loss=0.25),),
    )
    code, out, _ = ask(capsys, *words)
    flat = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for said in (
        "least time to the first token",
        r"transformer\.h\.\d on cuda:0",
        "nothing on disk",
        "int8, losing",
        "at once or in chunks of 256",
    ):
        assert said in flat


NOT_USABLE = [
    (("--prefill-chunk", "0"), "none,256,1024"),
    (("--prefill-chunk", "256,some"), "not 'some'"),
    (("--prefill-chunk", "256", "--forward"), "generate()"),
    (("--pin", "lm_head"), "REGEX=DEVICE"),
    (("--pin", "lm_head=cuda:3"), "there are cpu"),
    (("--pin", "h.0=cpu"), "no layer's whole name matches"),
    (("--pin", "(=cpu"), "not a regular expression"),
    (("--dtype", "int8"), "the first is what the model computes in"),
    (("--dtype", "bfloat16,int3"), "int3"),
    (("--cache", "dynamic,none"), "none"),
    (("--cache", "choose", "--forward"), "generate()"),
    (("--quality-budget", "1"), "--dtype"),
    (("--dtype", "choose", "--sensitivity", "/nowhere"), "--quality-budget"),
    (("--dtype", "choose", "--quality-budget", "1", "--sensitivity", "/nowhere"), "/nowhere"),
    (("--dtype", "choose", "--quality-budget", "-1"), "-1"),
    (("--time-limit", "0"), "more than nothing"),
    (("--objective", "speed"), "latency"),
    (("--pareto",), "no GPU"),
    (("--pareto", "--gpus", "1x24GB", "--out", "plan.json"), "--max-memory"),
    (("--pareto", "--gpus", "1x24GB", "--objective", "fit"), "not fit"),
]


@pytest.mark.parametrize(("words", "said"), NOT_USABLE)
def test_options_that_cannot_be_used(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    code, out, err = ask(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"groups": ".*"}]', '[{"groups": 1, "dtype": "int8", "loss": 1}]'])
def test_tables_of_losses_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    losses = tmp_path / "losses.json"
    losses.write_text(text)
    code, _, err = ask(capsys, "--dtype", "choose", "--quality-budget", "1", "--sensitivity", str(losses))
    assert code == 2
    assert str(losses) in err


def test_the_frontier_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", "2x600MB", "--ram", "5GB", "--prompt", "64", "--pareto")
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "Memory of the GPUs against time" in out
    code, out, err = ask(capsys, *words, "--json")
    assert (code, err) == (0, "")
    points = json.loads(out)["frontier"]
    assert points == sorted(points, key=lambda point: point["memory_bytes"])
    assert len(points) > 1
