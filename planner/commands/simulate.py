"""`plan simulate PLAN.json`: what every lane does, what bounds the call, memory and energy; and a trace to look at."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner import phrases
from planner.commands import options
from planner.commands.layout import Page
from planner.commands.progress import Progress
from planner.plan import Plan
from planner.serial import write_text
from planner.units import format_bytes, format_ns

if TYPE_CHECKING:
    from simulate import Timeline

# Where the busiest lane is idle for longer than it works, as where devices take turns, it is not what bounds the call.
_BOUNDS = 0.5


def run(argv: Sequence[str]) -> int:
    """Simulate a saved plan and print how busy each lane is; write a trace where one is asked for."""
    parser = options.Parser(
        prog="plan simulate",
        description="Simulate a saved plan: how busy every lane is, what bounds it, memory and energy.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="a plan that plan --out wrote")
    parser.add_argument(
        "--seed", type=int, metavar="N",
        help="draw the experts that tokens are routed to by this seed; else as many as are expected",
    )  # fmt: skip
    parser.add_argument("--trace", metavar="FILE", help="write a trace that Perfetto (ui.perfetto.dev) opens")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options.add_color_option(parser)
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    trace = options.output_path("--trace", args.trace, inputs=[args.plan])
    plan = Plan.load(args.plan)
    simulate = importlib.import_module("simulate")
    with Progress(quiet=args.quiet) as progress:
        progress.report("simulating")
        timeline: Timeline = simulate.run(plan, seed=args.seed)
        if trace is not None:
            write_text(trace, timeline.to_chrome_trace())
    found = figures(plan, timeline, simulate.energy_joules(plan, timeline))
    if args.json:
        options.say_json(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    options.say(render(plan, found, seed=args.seed, color=options.wants_color(args.color)))
    return 0


def figures(plan: Plan, timeline: Timeline, joules: dict[str, float]) -> dict[str, Any]:
    """Return what is printed, as data: times in ns, shares of 1, bytes and joules."""
    decode = sorted(timeline.step_ns[1:])
    seen = sorted({sample.device for sample in timeline.memory})
    return {
        "model": plan.model.id,
        "prefill_ns": timeline.prefill_ns,
        "decode_ns_per_token": timeline.decode_ns_per_token,
        "decode_ns": {f"p{p}": decode[min(len(decode) - 1, len(decode) * p // 100)] for p in (5, 50, 95)}
        if decode
        else {},
        "total_ns": timeline.total_ns,
        "lanes": [
            {"lane": use.lane, "prefill": round(use.prefill, 4), "decode": round(use.decode, 4)}
            for use in timeline.utilisation()
        ],
        "bottleneck": {"prefill": timeline.bottleneck(prefill=True), "decode": timeline.bottleneck()},
        "peak_bytes": {name: timeline.peak_bytes(name) for name in seen},
        "energy_joules": {name: round(value, 3) for name, value in joules.items()},
    }


def render(plan: Plan, found: dict[str, Any], *, seed: int | None, color: bool = False) -> str:
    """Return the figures as text of at most 80 columns."""
    page = Page(color=color)
    page.paragraph(found["model"], style="bold")
    page.paragraph(phrases.work(plan))
    page.line()
    # The first is always there; of a forward pass it is no prefill.
    phases = {"prefill": "prefill" if plan.workload.caller == "generate" else "forward"}
    if found["decode_ns"]:
        phases["decode"] = "decode"
    page.line(f"{phases['prefill']:<12}  {format_ns(found['prefill_ns'])}")
    if found["decode_ns"]:
        spread = found["decode_ns"]
        page.line(
            f"decode step   {format_ns(found['decode_ns_per_token'])}, 9 of 10 from {format_ns(spread['p5'])} to "
            f"{format_ns(spread['p95'])}"
        )
    page.line(f"in all        {format_ns(found['total_ns'])}")
    page.heading("How busy it is")
    width = max([len(entry["lane"]) for entry in found["lanes"]] + [4])
    page.line("  ".join([f"{'lane':<{width}}", *(f"{told:>7}" for told in phases.values())]), "dim")
    most = found["bottleneck"]
    for entry in found["lanes"]:
        shares = [f"{entry[phase]:>7.1%}" for phase in phases]
        words = [
            f"{'bounds' if entry[phase] >= _BOUNDS else 'busiest in'} {told}"
            for phase, told in phases.items()
            if most[phase] == entry["lane"]
        ]
        page.line("  ".join([f"{entry['lane']:<{width}}", *shares, *([" and ".join(words)] if words else [])]))
    page.heading("Memory at most")
    for name, nbytes in found["peak_bytes"].items():
        page.line(f"{name:<{width}}  {format_bytes(nbytes)}")
    joules = found["energy_joules"]
    page.heading("Energy, an estimate")
    if joules:
        page.paragraph(
            f"{_joules(sum(joules.values()))} J for the call ("
            + ", ".join(f"{name} {_joules(value)}" for name, value in joules.items())
            + "): the largest power of a product while it computes, a tenth of it else (assumed)"
        )
    missing = [device.name for device in plan.hardware.devices if device.name not in joules]
    if missing:
        page.paragraph(f"not known of {', '.join(missing)}")
    page.line()
    routed = f"drawn with seed {seed}" if seed is not None else "taken at their expected number (--seed N draws them)"
    if any(group.slices > 1 for kind in plan.graph.kinds for group in kind.groups):
        page.paragraph(f"Experts are {routed}.")
    return page.text()


def _joules(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
