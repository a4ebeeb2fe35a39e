"""Values: sizes, plans as JSON, errors, machines, workloads, and answers kept on disk."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import cache, errors
from planner.errors import InfeasibleError, InputError, PlanError, PlanFormatError
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware, products
from planner.plan import Plan, write_text
from planner.serial import canonical, decode
from planner.units import format_bytes, format_ns, parse_bytes, round_up
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

PROPERTY = settings(derandomize=True, deadline=None, database=None)
UNITS = {
    "": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "gb": 10**9, "gib": 2**30, "G": 10**9,
}  # fmt: skip


# Sizes


@PROPERTY
@given(count=st.integers(0, 10**15), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " ", "  "]))
def test_whole_sizes_mean_exactly_what_they_say(count: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{space}{count}{space}{unit}{space}") == count * UNITS[unit]


@PROPERTY
@given(
    whole=st.integers(0, 10**6),
    fraction=st.text("0123456789", min_size=1, max_size=12),
    unit=st.sampled_from(sorted(UNITS)),
)
def test_fractions_are_exact_and_rounded_down(whole: int, fraction: str, unit: str) -> None:
    exact = int(f"{whole}{fraction}") * UNITS[unit]
    assert parse_bytes(f"{whole}.{fraction}{unit}") == exact // 10 ** len(fraction)


@PROPERTY
@given(count=st.integers(0, 2**60))
def test_numbers_are_bytes(count: int) -> None:
    assert parse_bytes(count) == parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "24 GB GB", "24XB", "24,5GB", "1e9", "0x10", "∞", "nan", "24GB!", "2x24GB", "24.GB", ".5GB",
     "-1", "-3GB", -1, True, False, "1\u0661X"],
)  # fmt: skip
def test_what_is_not_a_size_is_refused(text: Any) -> None:
    with pytest.raises(InputError, match="the cap"):
        parse_bytes(text, what="the cap")


@PROPERTY
@given(text=st.text(max_size=20))
def test_any_text_is_a_size_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_bytes(text) >= 0


@PROPERTY
@given(count=st.integers(0, 10**15))
def test_printed_sizes_read_back_within_their_digits(count: int) -> None:
    back = parse_bytes(format_bytes(count).replace(",", ""))
    assert abs(back - count) <= count // 100


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (24 * 10**9, "24.00 GB"), (2**30, "1.07 GB"),
     (93_400_000_000, "93.40 GB"), (128 * 10**9, "128.0 GB"), (1_500 * 10**12, "1,500.0 TB")],
)  # fmt: skip
def test_sizes_are_printed_in_decimal_units(count: int, words: str) -> None:
    assert format_bytes(count) == words


@pytest.mark.parametrize(
    ("duration", "words"),
    [(0, "0 ns"), (999, "999 ns"), (1_000, "1.00 µs"), (81_000_000, "81.0 ms"),
     (4_710_000_000, "4.71 s"), (10**12, "1,000 s")],
)  # fmt: skip
def test_durations_are_printed_with_three_digits(duration: int, words: str) -> None:
    assert format_ns(duration) == words


@PROPERTY
@given(value=st.integers(0, 10**12), multiple=st.integers(1, 10**7))
def test_round_up_is_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple


# Plans as JSON


def small_plan(*, gpus: int = 1) -> Plan:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    groups = (group("attn", 8 * MIB), group("experts", 2 * MIB, slices=3), group("rest", 1024, streamable=False))
    kinds.append(LayerKind(name="Block", groups=groups))
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**11, moved=10**6)] * 3
    graph = build_graph(kinds, [work] * 3, [("embed", 0), ("block.0", 2), ("block.1", 2), ("head", 1)])
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(gpus)]
    sizes = {device.name: 52 * MIB for device in devices} | {"cpu": 64 * MIB, "disk": 2**30}
    return plan_of(Case(graph, machine(devices, sizes), Workload(prompt_tokens=8, new_tokens=8)))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


def test_a_plan_reads_back_as_it_was(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert text.endswith("}\n")
    assert next(iter(json.loads(text))) == "schema_version"


def test_a_plan_without_prediction_or_solver_reads_back(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    data["prediction"] = data["solver"] = None
    again = Plan.from_json(json.dumps(data))
    assert again.prediction is None
    assert again.solver is None


def test_a_saved_plan_loads(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_same_question_gives_the_same_bytes(plan: Plan) -> None:
    assert small_plan().to_json() == plan.to_json()


def test_a_graph_reads_back_as_it_was(plan: Plan) -> None:
    assert LayerGraph.from_dict(json.loads(plan.graph.to_json())) == plan.graph


def paths_in(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every object in JSON data, of each list's first entry only."""
    found = [path] if isinstance(data, dict) else []
    entries = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in entries:
        found += paths_in(value, (*path, key))
    return found


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


# Objects whose keys are names chosen by what they describe, so that none is required.
FREE_KEYS = {"versions", "flops_per_s", "peak_bytes", "peak_breakdown", "counters", "load_peak_bytes"}


def is_free(path: tuple[Any, ...]) -> bool:
    return any(key in FREE_KEYS for key in path)


def test_every_key_is_required_and_none_is_added(plan: Plan) -> None:
    whole = json.loads(plan.to_json())
    for path in paths_in(whole):
        if is_free(path):
            continue
        for key in at(whole, path):
            less = copy.deepcopy(whole)
            del at(less, path)[key]
            if (*path, key) == ("slots", 0, "holds"):
                continue
            with pytest.raises(PlanFormatError, match=str(key)):
                Plan.from_json(json.dumps(less))
        more = copy.deepcopy(whole)
        at(more, path)["surplus"] = 1
        with pytest.raises(PlanFormatError, match="surplus"):
            Plan.from_json(json.dumps(more))


def test_every_value_must_have_its_type(plan: Plan) -> None:
    whole = json.loads(plan.to_json())
    for path in paths_in(whole):
        for key, value in at(whole, path).items():
            for wrong in ({"a": []}, [[1]], True, 1.5, "words"):
                may_be_words = key in ("revision", "config_digest", "experts", "lane") and wrong == "words"
                may_be_fraction = key == "time_limit_s" and wrong == 1.5
                if type(wrong) is type(value) or may_be_words or may_be_fraction:
                    continue
                changed = copy.deepcopy(whole)
                at(changed, path)[key] = wrong
                with pytest.raises(PlanError):
                    Plan.from_json(json.dumps(changed))


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, 2.5])
def test_another_schema_version_is_refused(plan: Plan, version: Any) -> None:
    data = json.loads(plan.to_json())
    data["schema_version"] = version
    with pytest.raises(PlanFormatError, match="schema_version"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"plan"', "{}", "\x00", "[" * 100_000])
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanFormatError):
        Plan.from_json(text)


def test_a_plan_whose_parts_disagree_is_refused(plan: Plan) -> None:
    whole = json.loads(plan.to_json())

    def broken(change: Any) -> str:
        data = copy.deepcopy(whole)
        change(data)
        return json.dumps(data)

    for change in (
        lambda data: data["graph"]["layers"].append(data["graph"]["layers"][0]),
        lambda data: data["graph"]["layers"][1].update(kind=9),
        lambda data: data["graph"]["layers"][1].update(kind=-1),
        lambda data: data["graph"]["passes"][0]["spans"].pop(),
        lambda data: data["graph"]["edges"][0].update(source=5),
        lambda data: data["graph"]["kinds"][2]["groups"][1].update(slices=7),
        lambda data: data["graph"]["kinds"][2]["groups"][1].update(slices=0),
        lambda data: data["placements"][0].update(layer="nowhere"),
        lambda data: data.update(placements=[p for p in data["placements"] if p["layer"] != "block.1"]),
    ):
        with pytest.raises(PlanFormatError):
            Plan.from_json(broken(change))


def test_files_that_cannot_be_read_or_written(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(InputError):
        Plan.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError):
        Plan.load(tmp_path / "binary.json")
    with pytest.raises(InputError):
        plan.save(tmp_path / "no" / "folder.json")
    with pytest.raises(InputError):
        plan.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.json"]


def test_what_was_there_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    target.write_text("before")

    def fail(self: Path, other: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        write_text(target, "after")
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_json_has_no_nan_and_sorted_free_keys() -> None:
    assert canonical({"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


def test_decoding_says_where() -> None:
    with pytest.raises(PlanFormatError, match=re.escape("plan.prompt_tokens must be int, and is str")):
        decode(Workload, {**json.loads(canonical(Workload())), "prompt_tokens": "8"})


# Errors

EXIT_CODES = {
    "PlanError": 1, "InputError": 2, "InfeasibleError": 3, "NoSolutionInTimeError": 4, "PlanFormatError": 5,
    "PlanMismatchError": 5, "TraceError": 6,
}  # fmt: skip


def test_every_error_has_the_exit_code_that_is_documented() -> None:
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {name: value.exit_code for name, value in classes.items()} == EXIT_CODES
    for name, value in classes.items():
        assert issubclass(value, PlanError)
        assert re.search(rf"{name} +{value.exit_code} ", str(errors.__doc__)), name
        assert value.__doc__


@pytest.mark.parametrize("name", [name for name in EXIT_CODES if name != "InfeasibleError"])
def test_errors_are_json_ready(name: str) -> None:
    error = getattr(errors, name)("what, how much, and what to try")
    assert error.as_dict() == {"error": name, "message": str(error), "exit_code": EXIT_CODES[name]}


def test_an_infeasible_error_carries_its_causes() -> None:
    error = InfeasibleError(device="cuda:0", needed_bytes=9, available_bytes=4, smallest_fix="add 5 B", message="no")
    assert json.loads(json.dumps(error.as_dict())) == {
        "error": "InfeasibleError", "message": "no", "exit_code": 3, "device": "cuda:0", "needed_bytes": 9,
        "available_bytes": 4, "smallest_fix": "add 5 B",
    }  # fmt: skip


# Machines


def capacities(hardware: Hardware) -> dict[str, int]:
    return {pool.name: pool.capacity_bytes for pool in hardware.pools}


@pytest.mark.parametrize("gpus", [0, "0", "none", "", " 0 "])
def test_a_machine_without_gpus(gpus: str | int) -> None:
    hardware = Hardware.from_options(gpus)
    assert [device.name for device in hardware.devices] == ["cpu"]
    assert capacities(hardware) == {"cpu": 128 * 10**9, "disk": 10**12}


@pytest.mark.parametrize(
    ("gpus", "sizes"),
    [
        ("24GB", [24 * 10**9]),
        ("2x24GB", [24 * 10**9] * 2),
        ("2 x 24GiB", [24 * 2**30] * 2),
        ("2X24gb", [24 * 10**9] * 2),
        ("1x8GB,2x16GB", [8 * 10**9, 16 * 10**9, 16 * 10**9]),
        ("64x1GB", [10**9] * 64),
    ],
)
def test_gpus_by_size(gpus: str, sizes: list[int]) -> None:
    hardware = Hardware.from_options(gpus)
    assert [hardware.pool(device.pool).capacity_bytes for device in hardware.gpus] == sizes
    assert [device.name for device in hardware.gpus] == [f"cuda:{i}" for i in range(len(sizes))]
    assert hardware.devices[-1].name == "cpu"


@pytest.mark.parametrize("product", sorted(products()["products"]))
def test_gpus_by_product(product: str) -> None:
    facts = products()["products"][product]
    hardware = Hardware.from_options(f"2x{product.upper()}")
    assert len(hardware.gpus) == 2
    assert {device.product for device in hardware.gpus} == {facts["name"]}
    usable = hardware.pool("cuda:0").capacity_bytes
    assert usable == int(facts["usable_gib"] * 2**30)
    assert facts["label_gb"] * 0.85 * 2**30 < usable <= facts["label_gb"] * 2**30


@pytest.mark.parametrize(
    "gpus",
    ["x24GB", "2x", "2xx24GB", "two", "2x24", "24", "24QB", "0x24GB", "-1x24GB", "2x-24GB", "2x0GB", "65x24GB",
     "64x24GB,1x24GB", "99999999999x24GB", "2xrtx9999", "2x24GB,", ",", ";", "2x24GB;1xl4", "1.5x24GB",
     "2x24GB 1xl4", -1, 2, True],
)  # fmt: skip
def test_hostile_gpus_are_refused(gpus: Any) -> None:
    with pytest.raises(InputError, match="--gpus"):
        Hardware.from_options(gpus)


@PROPERTY
@given(text=st.text(max_size=15))
def test_any_text_is_gpus_or_an_input_error(text: str) -> None:
    try:
        hardware = Hardware.from_options(text)
    except InputError:
        return
    assert len(hardware.gpus) <= 64


@pytest.mark.parametrize("option", ["ram", "disk"])
@pytest.mark.parametrize("size", ["", "-1", "lots", "12XB", -5, True])
def test_hostile_sizes_of_memory_are_refused(option: str, size: Any) -> None:
    with pytest.raises(InputError, match=f"--{option}"):
        Hardware.from_options("24GB", **{option: size})


def test_no_ram_is_refused_and_no_disk_is_not() -> None:
    with pytest.raises(InputError, match="--ram"):
        Hardware.from_options("24GB", ram=0)
    assert capacities(Hardware.from_options("24GB", disk=0))["disk"] == 0


def test_what_is_not_said_is_listed_as_assumed() -> None:
    assumed = "\n".join(Hardware.from_options("24GB").assumptions)
    said = "\n".join(Hardware.from_options("24GB", ram="64GB", disk="2TB").assumptions)
    assert "host RAM 128.0 GB (assumed)" in assumed
    assert "disk 1.00 TB (assumed)" in assumed
    assert "host RAM 64.00 GB," in said
    assert "disk 2.00 TB," in said
    assert "GB = 10^9" in assumed


def test_max_memory_caps_and_never_raises() -> None:
    wanted = {0: "20GB", "cuda:1": "100GB", "cpu": "32GiB", "disk": 10**9}
    before = dict(wanted)
    hardware = Hardware.from_options("2x24GB", max_memory=wanted)  # type: ignore[arg-type]
    assert wanted == before
    assert capacities(hardware) == {"cuda:0": 20 * 10**9, "cuda:1": 24 * 10**9, "cpu": 32 * 2**30, "disk": 10**9}
    # A cap is what may be used: nothing is reserved of it.
    assert hardware.pool("cpu").usable_bytes == 32 * 2**30
    assert Hardware.from_options("2x24GB").pool("cpu").usable_bytes == 124 * 10**9


@pytest.mark.parametrize("name", ["cuda:2", 2, "gpu", "", "mps", "meta", "cuda", "CPU"])
def test_max_memory_of_what_is_not_there_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match="max_memory"):
        Hardware.from_options("2x24GB", max_memory={name: "1GB"})


@pytest.mark.parametrize("size", ["", "much", "-1GB", -1])
def test_max_memory_of_hostile_sizes_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match="max_memory"):
        Hardware.from_options("2x24GB", max_memory={"cuda:0": size})


def test_links_join_what_must_be_joined() -> None:
    hardware = Hardware.from_options("1xrtx4090,1xt4")
    for device in hardware.gpus:
        assert hardware.link("cpu", device.name) != hardware.link(device.name, "cpu")
        assert hardware.link("cpu", device.name).bytes_per_s > 0
    assert hardware.link("cuda:0", "cuda:1").bytes_per_s <= hardware.link("cpu", "cuda:1").bytes_per_s // 2
    assert hardware.link("disk", "cpu").latency_ns > 0
    with pytest.raises(KeyError):
        hardware.link("disk", "cuda:0")


def test_a_machine_reads_back_as_it_was() -> None:
    hardware = Hardware.from_options("1xrtx4090,1x16GB", max_memory={"cpu": "10GB"})
    assert decode(Hardware, json.loads(canonical(hardware))) == hardware


# Workloads


@pytest.mark.parametrize("name", ["batch_size", "prompt_tokens", "new_tokens", "num_beams"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "8", True, None])
def test_hostile_workloads_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        Workload(**{name: value})


def test_what_is_not_carried_yet_is_said() -> None:
    with pytest.raises(InputError, match="kv_dtype"):
        Workload(kv_dtype="int8")


def test_the_prefill_yields_the_first_token() -> None:
    assert Workload(new_tokens=1).decode_steps == 0
    assert Workload(new_tokens=128).decode_steps == 127
    assert Workload(caller="forward", new_tokens=1).decode_steps == 0


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.9}, {"top_p": 1.5, "sampling": "sample"}, {"num_return_sequences": 2}, {"num_beams": 0}],
    ids=str,
)
def test_what_generate_would_refuse_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Workload(**options)
    assert Workload(num_beams=4, num_return_sequences=2, batch_size=3).rows == 12


# Answers kept on disk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOADPLAN_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@PROPERTY
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r")))
def test_an_entry_reads_back(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOADPLAN_CACHE", str(tmp_path_factory.getbasetemp() / "entries"))
        name = cache.key("test", {"text": repr(text)})
        cache.write(name, text)
        assert cache.read(name) == text


def test_a_damaged_entry_is_a_miss(folder: Path) -> None:
    name = cache.key("test", {"a": 1})
    assert cache.read(name) is None
    cache.write(name, "an answer\nof two lines")
    assert cache.read(name) == "an answer\nof two lines"
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"", b"\xff" + whole[1:], whole.replace(b"two", b"2wo")):
        (folder / name).write_bytes(damaged)
        assert cache.read(name) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("LOADPLAN_CACHE", str(place))
        cache.write("name", "answer")
        assert cache.read("name") is None
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_oldest_entries_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_ENTRIES", 3)
    for number in range(3):
        cache.write(f"entry{number}", "answer")
        os.utime(folder / f"entry{number}", (number, number))
    cache.write("entry3", "answer")
    assert sorted(path.name for path in folder.iterdir()) == ["entry1", "entry2", "entry3"]


def test_keys_follow_everything_asked() -> None:
    keys = {
        cache.key("plan", {"a": 1}),
        cache.key("plan", {"a": 2}),
        cache.key("graph", {"a": 1}),
        cache.key("plan", {"a": 1, "b": None}),
        cache.key("plan", {"a": Workload()}),
        cache.key("plan", {"a": Workload(batch_size=2)}),
    }
    assert len(keys) == 6
    assert cache.key("plan", {"a": 1, "b": 2}) == cache.key("plan", {"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOADPLAN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"LOADPLAN_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/loadplan"),
        ({"LOADPLAN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/loadplan"),
    ],
)
def test_where_answers_are_kept(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.folder()) == expected
