"""The report is one file that needs nothing else, says what the plan says, and is safe from hostile names."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

import reports
from planner.errors import InputError
from planner.hardware import Hardware
from planner.plan import Execution, Plan, Solver
from planner.units import GB, format_bytes
from planner.workload import Workload
from reports.page import page_html
from reports.time_figures import memory_over_time
from simulate.timeline import MemorySample, Timeline

NOTHING = Timeline(intervals=(), memory=(), simulated_steps=(), step_ns=())


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
    policy = next(a for t, a in reader.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none';")


HOSTILE = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def hostile(plan: Plan) -> Plan:
    """Return the plan with every text of it turned against the page."""
    layers = tuple(dataclasses.replace(layer, name=f"{layer.name}{HOSTILE}") for layer in plan.graph.layers)
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, id=HOSTILE, note=HOSTILE, revision=HOSTILE, versions={HOSTILE: HOSTILE}),
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


def test_what_does_not_fit_is_said(plan: Plan, timeline: Timeline) -> None:
    assert plan.prediction is not None
    assert "too small" not in Reader(own(page_html(plan, timeline))).visible
    peaks = plan.prediction.peak_bytes | {"cuda:1": 25 * GB}
    over = dataclasses.replace(plan, prediction=dataclasses.replace(plan.prediction, peak_bytes=peaks))
    visible = Reader(own(page_html(over, timeline))).visible
    assert "1 of 4 too small; cuda:1 lacks 1.00 GB" in visible


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


def test_one_forward_pass_without_gpus(plan: Plan, sample: Callable[..., MemorySample]) -> None:
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
    seen = Timeline(intervals=(), memory=(sample(0, "cpu", weights=GB),), simulated_steps=(0,), step_ns=(10**9,))
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


def test_importing_reports_loads_no_plotly() -> None:
    names = ["page_html", "write_report"]
    code = f"import sys, reports; assert dir(reports) == {names}; print('plotly' in sys.modules)"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
    with pytest.raises(AttributeError):
        _ = reports.absent


def test_what_ended_the_search_and_what_dispatch_does_not_run_are_said(plan: Plan, timeline: Timeline) -> None:
    solver = Solver(
        status="feasible", objective_ns=10**6, bound_ns=999_951, cost_model="lanes-1", cut_short="time limit"
    )
    placed = tuple(dataclasses.replace(p, dtype="nf4") if p.group == "self_attn" else p for p in plan.placements)
    visible = Reader(own(page_html(dataclasses.replace(plan, solver=solver, placements=placed), timeline))).visible
    assert "gap 0.0049%" in visible
    assert "The time limit ended the search" in visible
    assert re.search(r"in nf4, the others in bfloat16\. dispatch does not run these yet", visible)
    assert "dispatch does not" not in Reader(own(page_html(plan, timeline))).visible


def test_memory_is_proven_in_bytes(plan: Plan, timeline: Timeline) -> None:
    solver = Solver(
        status="optimal", objective_ns=1, bound_ns=0, cost_model="lanes-1", objective_bytes=3 * 10**9,
        bound_bytes=3 * 10**9,
    )  # fmt: skip
    fit = dataclasses.replace(plan, solver=solver, workload=dataclasses.replace(plan.workload, objective="fit"))
    visible = Reader(own(page_html(fit, timeline))).visible
    assert "fit: 3.00 GB, bound 3.00 GB" in visible
    assert "by the cost model" not in visible


def test_how_busy_lanes_are_is_told(plan: Plan, timeline: Timeline) -> None:
    page = page_html(plan, timeline)
    section = page[page.index("How busy every lane is") : page.index("<h2>Devices</h2>")]
    for use in timeline.utilisation():
        row = f">{use.lane}</th>"
        assert row in section
        assert f"{use.decode:.1%}" in section[section.index(row) :].split("</tr>")[0]
    busiest = f">{timeline.bottleneck()}</th>"
    assert "decode" in section[section.index(busiest) :].split("</tr>")[0]
    assert "Energy of the call: about" in section
    empty = dataclasses.replace(timeline, intervals=())
    assert "How busy every lane is" not in page_html(plan, empty)
