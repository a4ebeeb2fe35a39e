"""What would make it fit: every change is applied and asked again, and something smaller is shown not to do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from brute_force import MOST_COLUMNS, Ledger
from planner import changes, memory
from planner import fixes as fixing
from planner.errors import InfeasibleError, NoSolutionInTimeError, TraceError
from planner.fixes import Fix, GraphQuestion, applied, fixes, with_fixes
from planner.graph import LayerKind
from planner.hardware import Hardware
from planner.rules import NO_RULES, Pin, Rules
from planner.units import parse_bytes
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, span
from tiny_models import CONFIGS

Fits = Callable[[Hardware, Workload, Rules], bool]


def short_of(nbytes: int, **more: object) -> InfeasibleError:
    return InfeasibleError(
        device="cpu", needed_bytes=nbytes, available_bytes=0, smallest_fix="more", message="nothing fits", **more
    )  # type: ignore[arg-type]


# Small graphs, against every placement of them


def small_case(seed: int) -> Case:
    """Return two blocks with experts on one or two alike GPUs, with memories too small by a little or by much."""
    rng = random.Random(seed)
    sizes = [3 * MIB, 8 * MIB, 11 * MIB]
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    groups = [group("attn", rng.choice(sizes))]
    groups.append(group("experts", rng.choice(sizes), slices=2) if rng.random() < 0.5 else group("mlp", 6 * MIB))
    kinds.append(LayerKind(name="Block", groups=tuple(groups)))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=rng.choice([MIB, 9 * MIB]), kv=(0, 2 * MIB), flops=10**9, moved=10**6)] * 3
    graph = build_graph(kinds, [ends, ends, work], [("embed", 0), ("block.0", 2), ("block.1", 2), ("head", 1)])
    gpus = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(rng.choice([1, 2]))]
    part = graph.weight_bytes // 100
    size = 28 * MIB + part * rng.choice([0, 15, 30, 45])
    capacities = {device.name: size for device in gpus}
    capacities |= {"cpu": 4 * MIB + part * rng.choice([0, 20, 40]), "disk": part * rng.choice([0, 10, 30])}
    return Case(graph, machine(gpus, capacities), Workload(prompt_tokens=8, new_tokens=4))


SEEDS = list(itertools.islice((seed for seed in range(60) if Ledger(small_case(seed)).best() is None), 10))


def infeasible(case: Case) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        GraphQuestion(case.graph, case.workload).plan(case.hardware, case.workload, NO_RULES)
    return caught.value


def found_for(case: Case, error: InfeasibleError) -> dict[str, Fix]:
    found = fixes(GraphQuestion(case.graph, case.workload), case.hardware, case.workload, NO_RULES, error)
    return {" ".join((fix.what, *fix.where)): fix for fix in found}


def best_with(case: Case, fix: Fix) -> int | None:
    hardware, workload, rules = applied(fix, case.hardware, case.workload, NO_RULES)
    assert (workload, rules) == (case.workload, NO_RULES)
    return Ledger(Case(case.graph, hardware, case.workload)).best()


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_is_enough_and_one_percent_less_is_not(seed: int) -> None:
    case = small_case(seed)
    missing = Ledger(case).missing()
    error = infeasible(case)
    error.shortfalls = missing
    found = found_for(case, error)
    grown = {name: fix for name, fix in found.items() if fix.what == "memory"}
    singles = {fix.where[0] for fix in grown.values() if len(fix.where) == 1}
    assert singles == {name for name in missing if name != "cuda:1"}
    for fix in grown.values():
        assert isinstance(fix.value, int)
        assert best_with(case, fix) is not None
        assert best_with(case, dataclasses.replace(fix, value=fix.value * 99 // 100)) is None
        size, unit = fix.text.split()[:2]
        assert parse_bytes(f"{size} {unit}") == fix.value
    several = len(case.hardware.gpus) > 1
    assert any(len(fix.where) == 2 for fix in grown.values()) == several


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_error_names_is_among_the_fixes(seed: int) -> None:
    case = small_case(seed)
    error = infeasible(case)
    if Ledger(case).missing():
        assert f"memory {error.device}" in found_for(case, error)


def with_gpus(case: Case, count: int) -> Ledger:
    """Return every placement of a case on a machine with so many GPUs more."""
    larger = changes.with_more_gpus(case.hardware, "cuda:0", count)
    return Ledger(Case(case.graph, larger, case.workload))


@pytest.mark.parametrize("seed", [seed for seed in SEEDS if with_gpus(small_case(seed), 1).size <= MOST_COLUMNS][:5])
def test_more_gpus_are_the_fewest(seed: int) -> None:
    case = small_case(seed)
    found = found_for(case, infeasible(case))
    fix = found.get("gpus cuda:0")
    fewest = fix.value if fix is not None else 2
    assert isinstance(fewest, int)
    for count in range(1, min(fewest, 2) + 1):
        if len(case.hardware.gpus) + count > 3:
            break
        ledger = with_gpus(case, count)
        if ledger.size > MOST_COLUMNS and count > 1:
            break
        assert (ledger.best() is not None) == (fix is not None and count == fewest)


@pytest.mark.parametrize("fewest", [*range(1, 10), 60])
@pytest.mark.parametrize("given_gpus", [1, 2, 60])
def test_the_fewest_gpus_of_any_number(fewest: int, given_gpus: int) -> None:
    hardware = Hardware.from_options(f"{given_gpus}x24GB")
    oracle = Oracle(lambda h, w, r: len(h.gpus) >= given_gpus + fewest)
    found = fixes(oracle, hardware, Workload(), NO_RULES, short_of(1000))
    most = min(8, 64 - given_gpus)
    assert [(fix.what, fix.value) for fix in found] == ([("gpus", fewest)] if fewest <= most else [])


# Anything that is asked, by a question that knows the answer


class Oracle:
    """Fits where `fits` says so; else short by what `short` says."""

    def __init__(self, fits: Fits, short: Callable[[Workload], int] = lambda work: 1000):
        self.fits, self.short, self.asked, self.told = fits, short, 0, list[str]()

    def report(self, text: str) -> None:
        self.told.append(text)

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> object:
        self.asked += 1
        if not self.fits(hardware, workload, rules):
            raise short_of(self.short(workload))
        return None


HARDWARE = Hardware.from_options("2x24GB", disk=0)


def only(fits: Fits, workload: Workload = Workload(), rules: Rules = NO_RULES, **more: object) -> list[Fix]:  # noqa: B008
    hardware = dataclasses.replace(HARDWARE, **more)  # type: ignore[arg-type]
    return list(fixes(Oracle(fits), hardware, workload, rules, short_of(1000)))


@pytest.mark.parametrize("name", ["never_on_disk", "contiguous", "never_across_nodes"])
def test_what_is_forbidden_may_be_allowed(name: str) -> None:
    rules = Rules(never_on_disk=True, contiguous=True, never_across_nodes=True)
    assert [fix.what for fix in only(lambda h, w, r: not getattr(r, name), rules=rules)] == [name]
    assert only(lambda h, w, r: False, rules=rules) == []


def test_one_pin_goes_or_all() -> None:
    rules = Rules(pins=(Pin(layers="a.*", device="cpu"), Pin(layers="b", device="cuda:0")))
    one = only(lambda h, w, r: Pin(layers="b", device="cuda:0") not in r.pins, rules=rules)
    assert [(fix.what, fix.where, fix.text) for fix in one] == [("pins", ("b=cuda:0",), "without --pin b=cuda:0")]
    all_of_them = only(lambda h, w, r: not r.pins, rules=rules)
    assert [fix.where for fix in all_of_them] == [("a.*=cpu", "b=cuda:0")]


def test_the_larger_precision_that_fits() -> None:
    assert [fix.value for fix in only(lambda h, w, r: bool(r.dtypes))] == ["int8"]
    assert [fix.value for fix in only(lambda h, w, r: "nf4" in r.dtypes)] == ["nf4"]
    given_int8 = Rules(dtypes=("int8",))
    assert [fix.value for fix in only(lambda h, w, r: "nf4" in r.dtypes, rules=given_int8)] == ["nf4"]


def test_a_cache_in_8_bits() -> None:
    assert [fix.what for fix in only(lambda h, w, r: w.cache == "fp8")] == ["cache"]
    assert only(lambda h, w, r: w.cache == "fp8", Workload(new_tokens=1)) == []


@settings(max_examples=25)
@given(limit=st.integers(0, 10**10), more=st.integers(1, 10**11))
def test_a_larger_pinned_limit_is_the_least(limit: int, more: int) -> None:
    found = only(
        lambda h, w, r: h.pinned_limit_bytes is not None and h.pinned_limit_bytes >= limit + more,
        pinned_limit_bytes=limit,
    )
    assert [fix.what for fix in found] == ["pinned"]
    value = found[0].value
    assert isinstance(value, int)
    assert limit + more <= value
    assert (value - limit) * 99 // 100 < more


@pytest.mark.parametrize("what", ["prompt_tokens", "batch_size", "new_tokens"])
@settings(max_examples=40)
@given(data=st.data())
def test_less_work_is_the_most_that_fits_found_in_few_steps(what: str, data: st.DataObject) -> None:
    asked = data.draw(st.sampled_from([2, 7, 200, 256, 257, 512, 1000, 8192, 100_000]))
    most = data.draw(st.integers(0, asked - 1))
    power = data.draw(st.sampled_from([0.5, 1, 2]))
    workload = Workload(**{"prompt_tokens": 1, "new_tokens": 1, "batch_size": 1, what: asked})  # type: ignore[arg-type]

    def short(work: Workload) -> int:
        return max(1, int(1000 * (getattr(work, what) - most) ** power))

    oracle = Oracle(lambda h, w, r: getattr(w, what) <= most, short)
    found = fixes(oracle, HARDWARE, workload, NO_RULES, short_of(short(workload)))
    chosen = [fix.value for fix in found if fix.what == what]
    exact = what == "batch_size" or asked <= 256 or most < 64
    expected = most if exact else most // 64 * 64
    assert chosen == ([expected] if most else [])
    before = Oracle(lambda h, w, r: False)
    fixes(before, HARDWARE, dataclasses.replace(workload, **{what: 1}), NO_RULES, short_of(1))  # type: ignore[arg-type]
    values = asked if exact else asked // 64
    assert oracle.asked - before.asked <= 4 + 3 * max(values, 64 if asked > 256 else 1).bit_length()


def test_linear_shortages_are_followed_in_a_handful_of_traces() -> None:
    asked: set[int] = set()

    def short(work: Workload) -> int:
        asked.add(work.prompt_tokens)
        return 10**6 * (work.prompt_tokens - 70_000)

    oracle = Oracle(lambda h, w, r: w.prompt_tokens <= 70_000 or asked.add(w.prompt_tokens) is not None, short)
    found = fixes(oracle, HARDWARE, Workload(prompt_tokens=131_072), NO_RULES, short_of(10**6 * 61_072))
    assert [fix.value for fix in found if fix.what == "prompt_tokens"] == [70_000 // 64 * 64]
    assert len(asked - {131_072}) <= 4


@given(missing=st.integers(1, 10**13))
def test_figures_are_the_least_of_three_digits(missing: int) -> None:
    figure = fixing._figure(fixing._index(missing))
    assert missing <= figure
    assert figure * 99 // 100 < missing
    assert len(str(figure).rstrip("0")) <= 3
    assert parse_bytes(fixing._words(figure)) == figure


def test_fixes_come_in_the_order_of_what_they_ask_of_a_person() -> None:
    rules = Rules(never_on_disk=True, pins=(Pin(layers="a", device="cpu"),))
    workload = Workload(batch_size=8, prompt_tokens=1024, new_tokens=8)

    def fits(hardware: Hardware, work: Workload, rules_: Rules) -> bool:
        return (hardware.pools, work, dataclasses.replace(rules_, time_limit_s=None)) != (
            HARDWARE.pools,
            workload,
            rules,
        )

    found = only(fits, workload, rules)
    assert [fix.what for fix in found] == [
        "never_on_disk", "pins", "cache", "prompt_tokens", "batch_size", "dtypes", "memory", "memory", "gpus",
    ]  # fmt: skip


def test_a_search_without_time_says_that_it_is_not_complete() -> None:
    oracle = Oracle(lambda h, w, r: True)
    error = short_of(1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixing, "BUDGET_S", 0.0)
        told = with_fixes(error, oracle, HARDWARE, Workload(), NO_RULES)
    assert told is error
    assert (told.fixes, told.fixes_complete, oracle.asked) == ((), False, 0)
    assert "other changes" in told.__notes__[-1]
    assert told.as_dict()["fixes_complete"] is False


def test_a_question_that_cannot_be_asked_is_no_fix() -> None:
    class Broken(Oracle):
        def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> object:
            if workload.cache == "fp8":
                raise TraceError("no such cache")
            if rules.dtypes:
                raise NoSolutionInTimeError("cut off")
            return super().plan(hardware, workload, rules)

    oracle = Broken(lambda h, w, r: False)
    told = with_fixes(short_of(1000), oracle, HARDWARE, Workload(), NO_RULES)
    assert (told.fixes, told.fixes_complete) == ((), False)
    assert set(oracle.told) == {"looking for what would make it fit"}


def test_fixes_are_told_as_json_and_as_notes() -> None:
    error = short_of(1000, shortfalls={"cpu": 1000})
    told = with_fixes(error, Oracle(lambda h, w, r: w.cache == "fp8"), HARDWARE, Workload(), NO_RULES)
    data = json.loads(json.dumps(told.as_dict()))
    assert data["shortfalls"] == {"cpu": 1000}
    assert data["fixes"] == [{"what": "cache", "where": [], "value": "fp8", "text": told.fixes[0].text}]
    assert told.__notes__[0] == "this would make it fit (each was planned again):"


# Models, traced anew for other work


@pytest.mark.parametrize(("what", "asked"), [("prompt_tokens", 200), ("prompt_tokens", 640), ("batch_size", 9)])
def test_less_work_of_a_model_fits_and_a_step_more_does_not(what: str, asked: int) -> None:
    config = CONFIGS["llama"]()
    work = {"prompt_tokens": 64, "batch_size": 2, "new_tokens": 4}

    def plan_of(capacity: int, **changed: int) -> planner.Plan:
        options = {**work, what: asked, **changed}
        return planner.plan_model(config, ram=capacity, disk=0, weight_dtype="float32", use_cache=False, **options)

    roomy = plan_of(10 * 10**9, **{what: asked // 2})
    planned = memory.planned_bytes(roomy.graph, roomy.hardware, roomy.placements, roomy.slots)
    capacity = planned["cpu"].total + roomy.hardware.pool("cpu").reserved_bytes
    with pytest.raises(InfeasibleError) as caught:
        plan_of(capacity)
    found = {fix.what: fix.value for fix in caught.value.fixes}
    chosen = found[what]
    assert isinstance(chosen, int)
    step = 64 if what == "prompt_tokens" and asked > 256 else 1
    assert chosen % step == 0
    assert chosen >= asked // 2 // step * step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.fixes.BUDGET_S", 0.0)
        plan_of(capacity, **{what: chosen})
        with pytest.raises(InfeasibleError):
            plan_of(capacity, **{what: chosen + step})
    assert isinstance(found["memory"], int)
    plan_of(capacity + found["memory"])
