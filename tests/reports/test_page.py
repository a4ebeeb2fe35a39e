"""The report shows the plan's own numbers, in one file that needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

import reports
from planner import memory
from planner.errors import InputError
from planner.graph import Layer, LayerGraph, LayerKind, Tensor, WeightGroup
from planner.hardware import Hardware
from planner.plan import Execution, ModelInfo, Placement, Plan, Prediction, Solver
from planner.units import GB, MB, format_bytes
from planner.workload import Workload
from reports.figures import memory_by_device, placement_map
from reports.page import page_html
from reports.placement_rows import layer_ranges, placement_rows
from reports.style import GPU_COLOURS, ink_on, place_colours
from reports.time_figures import MAX_BARS, MAX_SAMPLES, memory_over_time, merged, step_lanes, thinned
from simulate.timeline import Interval, MemorySample, Timeline

LAYERS = 12
EXPERTS = 8
NOTHING = Timeline(intervals=(), memory=(), simulated_steps=(), step_ns=())


def group(name: str, nbytes: int, slices: int = 1) -> WeightGroup:
    tensor = Tensor(
        name=f"{name}.weight", shape=(slices, nbytes // slices // 2), dtype="bfloat16", nbytes=nbytes
    )
    return WeightGroup(
        name=name, slices=slices, used_slices=min(2, slices), streamable=slices > 1, tensors=(tensor,)
    )


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
        model="acme/moe", batch_size=1, kinds=kinds, layers=layers, edges=(), ties=(), loose=(), passes=()
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
        schema_version=1,
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
        ),
        solver=Solver(
            status="optimal", objective_ns=4_000_000_000, bound_ns=4_000_000_000, cost_model="lanes-1"
        ),
    )


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


def sample(time_ns: int, device: str, **kinds: int) -> MemorySample:
    empty = dict.fromkeys(("weights", "kv_cache", "activations", "slots", "workspace", "context"), 0)
    return MemorySample(time_ns=time_ns, device=device, **(empty | kinds))


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and text by the tag that holds it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0], data))

    @property
    def visible(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


def own(page: str) -> str:
    """Return the page without plotly.js, which bears addresses of map servers that no figure asks for."""
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def drawn(page: str) -> dict[str, Any]:
    """Return the figures as the page's script gets them."""
    start = page.index("const FIGURES = ") + len("const FIGURES = ")
    figures: dict[str, Any] = json.JSONDecoder().raw_decode(page[start:])[0]
    return figures


def test_every_layer_and_place_is_named(plan: Plan, timeline: Timeline) -> None:
    page = own(page_html(plan, timeline))
    for layer in plan.graph.layers:
        assert re.search(rf"{re.escape(layer.name)}(?!\d)", page), layer.name
    visible = Reader(page).visible
    for pool in plan.hardware.pools:
        assert pool.name in visible
    for device in plan.hardware.devices:
        assert device.product in visible


def test_the_answer_is_in_words(plan: Plan, timeline: Timeline) -> None:
    visible = Reader(own(page_html(plan, timeline))).visible
    for words in (
        "acme/moe",
        "1.23 s",
        "56.7 ms",
        "13.3",
        "9.87 s",
        "optimal",
        "lanes-1",
        "2.11.0",
        "5.17.0",
        "sdpa",
    ):
        assert words in visible
    for assumption in (*plan.assumptions, *plan.hardware.assumptions):
        assert assumption in visible
    assert plan.prediction is not None
    for pool in plan.hardware.pools:
        assert format_bytes(plan.prediction.peak_bytes[pool.name]) in visible
        assert format_bytes(pool.usable_bytes) in visible


def test_a_gap_is_not_called_optimal(plan: Plan, timeline: Timeline) -> None:
    solver = Solver(status="feasible", objective_ns=1000, bound_ns=900, cost_model="lanes-1")
    visible = Reader(own(page_html(dataclasses.replace(plan, solver=solver), timeline))).visible
    assert "gap 10.0%" in visible
    assert "optimal" not in visible


def test_nothing_is_fetched(plan: Plan, timeline: Timeline) -> None:
    page = own(page_html(plan, timeline))
    assert not re.search(r"""(src|href|srcset|action|data)\s*=\s*["']?\s*(https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"@import|url\s*\(|https?://", page, re.IGNORECASE)
    reader = Reader(page)
    assert not {"link", "img", "iframe", "base", "object", "embed"} & {tag for tag, _ in reader.tags}
    assert all("src" not in attributes for tag, attributes in reader.tags if tag == "script")
    policy = next(
        a for t, a in reader.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (policy["content"] or "").startswith("default-src 'none';")


HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def hostile(plan: Plan) -> Plan:
    """Return the plan with every text of it turned against the page."""
    layers = tuple(dataclasses.replace(layer, name=f"{layer.name}{HOSTILE}") for layer in plan.graph.layers)
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(
            plan.model, id=HOSTILE, note=HOSTILE, revision=HOSTILE, versions={HOSTILE: HOSTILE}
        ),
        graph=dataclasses.replace(plan.graph, layers=layers),
        placements=tuple(dataclasses.replace(p, layer=f"{p.layer}{HOSTILE}") for p in plan.placements),
        assumptions=(HOSTILE,),
        hardware=dataclasses.replace(
            plan.hardware,
            devices=tuple(dataclasses.replace(d, product=HOSTILE) for d in plan.hardware.devices),
            assumptions=(HOSTILE,),
        ),
        execution=Execution(attention=HOSTILE, experts=HOSTILE),
        solver=Solver(status="optimal", objective_ns=1, bound_ns=1, cost_model=HOSTILE),
    )


def test_hostile_names_stay_text(plan: Plan, timeline: Timeline) -> None:
    intervals = tuple(dataclasses.replace(interval, label=HOSTILE) for interval in timeline.intervals)
    plain_page = page_html(plan, timeline)
    page = page_html(hostile(plan), dataclasses.replace(timeline, intervals=intervals))
    tags = [tag for tag, _ in Reader(own(page)).tags]
    assert tags.count("script") == 2
    assert set(tags) == {tag for tag, _ in Reader(own(plain_page)).tags}
    assert HOSTILE in Reader(own(page)).visible
    assert "<script>alert" not in page
    # Plotly's own labels understand tags, so what it gets must be escaped once more.
    assert "<script>" not in json.dumps(drawn(page))
    assert "<img" not in json.dumps(drawn(page))
    # Nor may any part of the JSON end the script that holds it, whatever else was forgotten.
    script = page[page.index("const FIGURES = ") : page.index("const dark = ")]
    assert "<" not in script


def test_a_name_that_is_no_utf8_can_be_written(plan: Plan, timeline: Timeline, tmp_path: Path) -> None:
    odd = dataclasses.replace(plan, model=dataclasses.replace(plan.model, id="bad\udcff"))
    reports.write_report(odd, timeline, tmp_path / "report.html")
    assert "bad?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_written_whole_or_not_at_all(plan: Plan, timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    reports.write_report(plan, timeline, path)
    text = path.read_text(encoding="utf-8")
    assert text == reports.page_html(plan, timeline)
    assert text.rstrip().endswith("</html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written(
    plan: Plan, timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        reports.write_report(plan, timeline, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot write"):
        reports.write_report(plan, timeline, tmp_path / "absent" / "report.html")


def test_bars_are_the_predicted_bytes(plan: Plan) -> None:
    assert plan.prediction is not None
    figure = memory_by_device(plan)
    for pool in plan.hardware.pools:
        bars = [trace for trace in figure.data if trace.meta == pool.name]
        assert sum(bar.x[0] for bar in bars) == plan.prediction.peak_bytes[pool.name]
        shown = {bar.name.replace("KV cache", "kv_cache"): bar.x[0] for bar in bars}
        assert shown == {kind: n for kind, n in plan.prediction.peak_breakdown[pool.name].items() if n}
    assert figure.layout.barmode == "stack"


def test_capacity_lines_stand_at_capacity(plan: Plan, timeline: Timeline) -> None:
    limits = [shape for shape in memory_by_device(plan).layout.shapes if shape.name == "capacity"]
    assert [shape.x0 for shape in limits] == [pool.capacity_bytes for pool in plan.hardware.pools]
    assert [shape.x1 for shape in limits] == [pool.capacity_bytes for pool in plan.hardware.pools]
    limits = [shape for shape in memory_over_time(plan, timeline).layout.shapes if shape.name == "capacity"]
    over_time = ("cuda:0", "cuda:1", "cpu")
    assert [shape.y0 for shape in limits] == [plan.hardware.pool(name).capacity_bytes for name in over_time]


def test_what_does_not_fit_is_said(plan: Plan, timeline: Timeline) -> None:
    assert plan.prediction is not None
    assert "too small" not in Reader(own(page_html(plan, timeline))).visible
    peaks = plan.prediction.peak_bytes | {"cuda:1": 25 * GB}
    over = dataclasses.replace(plan, prediction=dataclasses.replace(plan.prediction, peak_bytes=peaks))
    visible = Reader(own(page_html(over, timeline))).visible
    assert "1 of 4 too small; cuda:1 lacks 1.00 GB" in visible


def test_the_map_covers_every_group_in_proportion(plan: Plan) -> None:
    figure = placement_map(plan)
    names = [layer.name for layer in plan.graph.layers]
    covered: dict[tuple[str, str], dict[str, float]] = {}
    for trace in figure.data:
        for position, height, words in zip(
            trace.x, trace.y, trace.customdata or (), strict=bool(trace.customdata)
        ):
            assert names[int(position)] == words[0]
            covered.setdefault((words[0], words[1]), {})[trace.name] = height
    assert set(covered) == {(placement.layer, placement.group) for placement in plan.placements}
    assert covered["model.layers.0", "mlp.experts"] == pytest.approx(
        {"cuda:0": 0.6 * 6 / 8, "cpu": 0.6 * 2 / 8}
    )
    assert covered["model.layers.11", "mlp.experts"] == pytest.approx({"disk": 0.6})
    assert covered["lm_head", "weights"] == pytest.approx({"cuda:1": 0.6})
    strips = [trace for trace in figure.data if trace.text]
    assert [(trace.text[0], round(trace.width[0] + 0.1)) for trace in strips] == [
        ("cuda:0", 7),
        ("cuda:1", 7),
    ]


def test_rows_hold_every_placement_once(plan: Plan) -> None:
    rows = placement_rows(plan)
    assert sum(row.nbytes for row in rows) == sum(placement.nbytes for placement in plan.placements)
    assert sorted((name, row.group) for row in rows for name in row.names) == sorted(
        (placement.layer, placement.group) for placement in plan.placements
    )
    words = [row.words() for row in rows]
    assert "model.layers.0\N{EN DASH}5 · self_attn · cuda:0" in words
    assert "model.layers.0\N{EN DASH}5 · mlp.experts · cpu (pinned) → cuda:0, 6 of 8 stay" in words
    assert "model.layers.11 · mlp.experts · disk → cuda:1" in words


def test_ranges() -> None:
    names = ["embed", "m.0", "m.1", "m.2", "m.4", "m.6", "m.7", "d.0", "d.1", "head", ""]
    assert layer_ranges(names) == [
        "embed", "m.0\N{EN DASH}2", "4", "6\N{EN DASH}7", "d.0\N{EN DASH}1", "head", "(the model itself)"
    ]  # fmt: skip
    assert layer_ranges([]) == []


def test_memory_over_time_follows_the_samples(plan: Plan, timeline: Timeline) -> None:
    figure = memory_over_time(plan, timeline)
    held = [trace for trace in figure.data if trace.name == "held"]
    for device, trace in zip(("cuda:0", "cuda:1", "cpu"), held, strict=True):
        assert trace.line.shape == "hv"
        assert max(y for y in trace.y if y is not None) == timeline.peak_bytes(device)
        assert max(x for x in trace.x if x is not None) == pytest.approx(timeline.total_ns / 1e9)
    # Between steps 1 and 63 nothing was simulated: cuda:0 is drawn dotted there, from one to the other.
    gap = next(trace for trace in figure.data if trace.name == "not simulated")
    assert gap.line.dash == "dot"
    assert gap.x[:2] == pytest.approx((1.05, 1.0 + 62 * 0.05))


def test_lanes_show_each_step_from_its_start(plan: Plan, timeline: Timeline) -> None:
    figure = step_lanes(plan, timeline)
    lanes = ["cpu→cuda:0 copy", "cuda:0 compute", "cpu→cuda:1 copy", "cuda:1 compute"]
    assert list(reversed(figure.layout.yaxis.categoryarray)) == lanes
    for step, traces in ((0, figure.data[:4]), (1, figure.data[4:])):
        for lane, trace in zip(lanes, traces, strict=True):
            assert trace.name == lane
            assert sum(trace.x) == pytest.approx(timeline.busy_ns(lane, step) / 1e9)
            assert min(trace.base) >= 0
            assert max(trace.base) < timeline.step_ns[step] / 1e9
    last = step_lanes(plan, timeline, steps=(63,))
    assert len(last.data) == 4


def test_many_intervals_become_few_bars(plan: Plan) -> None:
    count = 40_000
    intervals = tuple(
        Interval(lane=f"cuda:{n % 2} compute", start_ns=100 * n, end_ns=100 * n + 90, action="run",
                 label=f"run {n}", step=0)
        for n in range(count)
    )  # fmt: skip
    bars = merged(intervals, MAX_BARS)
    assert 2 <= len(bars) <= MAX_BARS
    assert sum(bar.count for bar in bars) == count
    assert sum(bar.busy_ns for bar in bars) == 90 * count
    assert all(bar.busy_ns <= bar.end_ns - bar.start_ns for bar in bars)
    samples = tuple(
        sample(100 * n, "cuda:0", activations=7 * GB if n == 12_345 else n % 7) for n in range(count)
    )
    kept = thinned(samples, MAX_SAMPLES)
    assert len(kept) <= MAX_SAMPLES + 2
    assert max(entry.total_bytes for entry in kept) == 7 * GB
    timeline = Timeline(intervals=intervals, memory=samples, simulated_steps=(0,), step_ns=(100 * count,))
    assert len(own(page_html(plan, timeline))) < 1_000_000


def test_few_intervals_are_left_alone(timeline: Timeline) -> None:
    bars = merged(timeline.intervals, MAX_BARS)
    assert sorted((bar.lane, bar.start_ns, bar.end_ns) for bar in bars) == sorted(
        (interval.lane, interval.start_ns, interval.end_ns) for interval in timeline.intervals
    )


def test_without_prediction_solver_or_timeline(plan: Plan, timeline: Timeline) -> None:
    bare = dataclasses.replace(plan, prediction=None, solver=None)
    page = own(page_html(bare, NOTHING))
    visible = Reader(page).visible
    assert "carries no prediction" in visible
    assert "No solver was run" in visible
    assert "was not simulated" in visible
    assert "not predicted" in visible
    assert list(drawn(page)) == ["plot-placement"]
    for layer in plan.graph.layers:
        assert layer.name in page
    assert "prefill, simulated" in Reader(own(page_html(bare, timeline))).visible


def test_one_forward_pass_without_gpus(plan: Plan) -> None:
    hardware = Hardware.from_options(0)
    placements = tuple(
        dataclasses.replace(entry, home="cpu", run_on="cpu", memory="pageable", resident_slices=None)
        for entry in plan.placements
    )
    lone = dataclasses.replace(
        plan,
        hardware=hardware,
        placements=placements,
        slots=(),
        prediction=None,
        workload=Workload(caller="forward"),
    )
    seen = Timeline(
        intervals=(), memory=(sample(0, "cpu", weights=GB),), simulated_steps=(0,), step_ns=(10**9,)
    )
    visible = Reader(own(page_html(lone, seen))).visible
    assert "no GPU" in visible
    assert "in one forward pass" in visible
    assert not memory_over_time(lone, seen).layout.updatemenus


def test_the_page_can_be_read_by_everyone(plan: Plan, timeline: Timeline) -> None:
    reader = Reader(own(page_html(plan, timeline)))
    tags = reader.tags
    assert ("html", {"lang": "en"}) in tags
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in tags)
    assert [text for tag, text in reader.texts if tag == "title"] == ["Load plan of acme/moe"]
    assert [tag for tag, _ in tags].count("h1") == 1
    plots = [a for _, a in tags if a.get("class") == "plot"]
    assert len(plots) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_same_question_gives_the_same_page(plan: Plan, timeline: Timeline) -> None:
    assert page_html(plan, timeline) == page_html(plan, timeline)


def test_each_place_has_one_colour(plan: Plan, timeline: Timeline) -> None:
    colours = place_colours(plan.hardware)
    assert len(set(colours.values())) == 4
    for trace in placement_map(plan).data:
        place = trace.text[0] if trace.text else trace.name
        assert trace.marker.color == colours[place]
    for trace in step_lanes(plan, timeline).data:
        assert trace.marker.color == colours[re.split("→| ", trace.name)[0]]
    eight = place_colours(Hardware.from_options("8x80GB"))
    assert len(set(eight.values())) == 10
    assert set(place_colours(Hardware.from_options("64x80GB")).values()) == set(eight.values())
    assert ink_on("#ffffff") != ink_on("#000000")
    assert set(GPU_COLOURS) < set(eight.values())


def test_importing_reports_loads_no_plotly() -> None:
    names = ["page_html", "write_report"]
    code = f"import sys, reports; assert dir(reports) == {names}; print('plotly' in sys.modules)"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    with pytest.raises(AttributeError):
        _ = reports.absent  # type: ignore[attr-defined]
