"""`plan calibrate`: measures this machine, and writes it as a file that --hardware reads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from planner.commands import options
from planner.commands.layout import Page
from planner.commands.progress import Progress
from planner.serial import encode
from planner.units import GB, format_ns

if TYPE_CHECKING:
    from simulate.calibration import Calibration, Figure

_EPILOG = """\
examples:
  plan calibrate --out here.json
  plan --model gpt2 --hardware here.json

What is not measured stays assumed, and the file says so. Let nothing else run
meanwhile: what disturbs it widens the spread, and predictions with it.
"""


def run(argv: Sequence[str]) -> int:
    """Measure, write the file if one is asked for, then print."""
    parser = options.Parser(
        prog="plan calibrate", description="Measure this machine's rates into a hardware file.", epilog=_EPILOG
    )
    parser.add_argument("--out", metavar="FILE", help="write the machine as JSON, for --hardware FILE")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples: in seconds, and less exact")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="S", help="to spend on each figure (default: 0.3, with --quick 0.02)"
    )
    parser.add_argument("--folder", default=".", metavar="DIR", help="whose disk is measured (default: this one)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options.add_color_option(parser)
    options.add_output_options(parser)
    args = parser.parse_args(options.join_negatives(argv))
    out = options.output_path("--out", args.out)
    with Progress(quiet=args.quiet) as progress:
        progress.report("loading torch")
        from simulate.calibration import calibrate

        found = calibrate(quick=args.quick, seconds=args.seconds, folder=args.folder, report=progress.report)
    if out is not None:
        found.hardware.save(out)
    if args.json:
        options.say_json(json.dumps(encode(found), indent=1))
        return 0
    options.say(render(found, color=options.wants_color(args.color)))
    if out is not None:
        print(f"plan: wrote {out}", file=sys.stderr)
    return 0


def render(found: Calibration, *, color: bool) -> str:
    """Return what was measured as text of at most 80 columns."""
    page = Page(color=color)
    page.line("This machine, measured", "bold")
    for group, figures in groupby(found.figures, key=lambda figure: figure.group):
        page.line()
        page.line(f"{group:44}{'mean':>15}{'9 of 10 within':>18}", "dim")
        for figure in figures:
            page.line(f"  {figure.name:42}{_value(figure):>15}{f'{figure.spread:.1%}':>18}")
    page.heading("Shared")
    for shared in found.hardware.shared:
        page.paragraph(f"{shared.name}: {_rate(shared.bytes_per_s)} for {', '.join(shared.users)}", first="  - ")
    page.heading("Assumptions")
    for note in found.hardware.assumptions:
        page.paragraph(note, first="  - ", style="dim")
    return page.text()


def _value(figure: Figure) -> str:
    if figure.unit == "ns":
        return format_ns(figure.value)
    if figure.unit == "B/s":
        return _rate(figure.value)
    value = figure.value / 10**9
    return f"{value:,.{1 if value >= 10 else 3}f} GFLOP/s"


def _rate(bytes_per_s: int) -> str:
    return f"{bytes_per_s / GB:,.2f} GB/s"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, more than 0 and at most 60")
    return value
