"""`plan --model X --gpus Y`: finds the best placement and prints it."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.commands import options, rules_options
from planner.commands.progress import Progress
from planner.errors import InputError
from planner.hardware import Hardware
from planner.plan import Plan

_EPILOG = """\
commands:
  plan memory --model X   what a model takes on one device, phase by phase
  plan models [TEXT]      models that can be named without a network
  plan gpus               GPU products that --gpus knows
  plan show PLAN.json     print a saved plan again
  plan verify PLAN.json   check a saved plan against its own constraints
  plan check PLAN.json MEASUREMENT.json   compare it with what a run took
  plan explain PLAN.json  why a saved plan, or a layer of it, is as it is
  plan compare --model X  beside device maps: Accelerate's own, or from files
  plan calibrate          measure this machine into a file for --hardware

examples:
  plan --model mistralai/Mixtral-8x7B --gpus 2x24GB
  plan --model ./my-model --gpus 2xrtx4090,1xl4 --prompt 4096 --batch 4
  plan --model gpt2 --gpus 0 --ram 16GB --out plan.json --report placement.html
  plan --model qwen3-8b --gpus 24GB --objective max-context --pin '.*=cuda:0'
  plan --model mistralai/Mixtral-8x7B --gpus 2x24GB --pareto

GB is 10^9 bytes and GiB 2^30. Exit codes: 0 done, 2 an input cannot be used,
3 nothing fits, 4 no answer in time, 5 a plan file is wrong, 6 the model cannot
be traced, 1 a fault of our own.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command without a subcommand."""
    result = options.Parser(
        prog="plan",
        description="Decide where every weight waits and every layer runs, and what it will cost.",
        epilog=_EPILOG,
    )
    result.add_argument("--version", action="version", version=f"loadplan {importlib.metadata.version('loadplan')}")
    result.add_argument(
        "--model", required=True, metavar="NAME", help="a model's name, or a folder with its config.json"
    )
    options.add_machine_options(result)
    options.add_work_options(result, choices=True)
    rules_options.add(result)
    options.add_source_options(result)
    output = result.add_argument_group("the output")
    output.add_argument("--out", metavar="FILE", help="write the plan as JSON")
    output.add_argument("--report", metavar="FILE", help="write one self-contained HTML page")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    output.add_argument("--no-cache", action="store_true", help="neither use nor keep answers on disk")
    options.add_color_option(output)
    options.add_output_options(output)
    return result


def run(argv: Sequence[str]) -> int:
    """Plan, write the files asked for, then print; outputs are checked before the work starts."""
    args = parser().parse_args(options.join_negatives(argv))
    hardware = options.hardware(args)
    read = [path for path in (args.model, args.hardware, args.experts_popularity) if path is not None]
    out = options.output_path("--out", args.out, inputs=read)
    page = options.output_path("--report", args.report, inputs=read)
    options.different_paths(out, page)
    if args.pareto:
        return _frontier(args, hardware)
    with Progress(quiet=args.quiet) as progress:
        plan = _plan(args, hardware, progress)
        if page is not None:
            write_page(plan, page, progress)
        if out is not None:
            plan.save(out)
    if args.json:
        options.say_json(plan.to_json())
        return 0
    from planner.commands import terminal

    options.say(terminal.render(plan, color=options.wants_color(args.color)))
    _tell_written(out, page)
    return 0


def write_page(plan: Plan, path: Path, progress: Progress) -> None:
    """Write the HTML report of a plan."""
    progress.report("drawing the report")
    import reports
    import simulate

    reports.write_report(plan, simulate.run(plan), path)


def _plan(args: argparse.Namespace, hardware: Hardware, progress: Progress) -> Plan:
    from planner.api import plan_model

    return plan_model(args.model, **_question(args, hardware, progress))


def _question(args: argparse.Namespace, hardware: Hardware, progress: Progress) -> dict[str, Any]:
    """Return the keywords of `plan_model` that the command line stands for."""
    return {
        "hardware": hardware,
        **options.work(args),
        **rules_options.choices(args),
        "popularity": args.experts_popularity,
        "hub": args.hub,
        "revision": args.revision,
        "trust_remote_code": args.trust_remote_code,
        "use_cache": not args.no_cache,
        "report": progress.report,
    }


def _frontier(args: argparse.Namespace, hardware: Hardware) -> int:
    """Print the frontier of memory against time."""
    if args.out is not None or args.report is not None:
        raise InputError(
            "--pareto finds several plans, and --out and --report write one: choose a point, then ask for its plan "
            "with --max-memory"
        )
    from planner.api import frontier
    from planner.commands import frontier as table

    with Progress(quiet=args.quiet) as progress:
        points = frontier(args.model, **_question(args, hardware, progress))
    if args.json:
        options.say_json(table.as_json(points))
    else:
        options.say(table.render(points, color=options.wants_color(args.color)))
    return 0


def _tell_written(out: Path | None, page: Path | None) -> None:
    for path in (out, page):
        if path is not None:
            print(f"plan: wrote {path}", file=sys.stderr)
