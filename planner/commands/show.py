"""`plan show plan.json`: prints a saved plan as `plan` printed it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from planner.commands import options
from planner.commands.plan import write_page
from planner.commands.progress import Progress
from planner.plan import Plan


def run(argv: Sequence[str]) -> int:
    """Print the plan in a file, and write its report where one is asked for."""
    parser = options.Parser(prog="plan show", description="Print a saved plan.")
    parser.add_argument("plan", metavar="PLAN.json", help="a plan that plan --out wrote")
    parser.add_argument("--report", metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options.add_color_option(parser)
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    page = options.output_path("--report", args.report, inputs=[args.plan])
    plan = Plan.load(args.plan)
    if page is not None:
        with Progress(quiet=args.quiet) as progress:
            write_page(plan, page, progress)
    if args.json:
        options.say_json(plan.to_json())
        return 0
    from planner.commands import terminal

    options.say(terminal.render(plan, color=options.wants_color(args.color)))
    if page is not None:
        print(f"plan: wrote {page}", file=sys.stderr)
    return 0
