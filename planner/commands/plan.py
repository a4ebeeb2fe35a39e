"""`plan --model X --gpus Y`: finds the best placement and prints it."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from planner.commands import options
from planner.commands.progress import Progress
from planner.plan import Plan

_EPILOG = """\
commands:
  plan memory --model X   what a model takes on one device, phase by phase
  plan models [TEXT]      models that can be named without a network
  plan gpus               GPU products that --gpus knows
  plan show PLAN.json     print a saved plan again
  plan verify PLAN.json   check a saved plan against its own constraints
  plan explain PLAN.json  why a saved plan, or a layer of it, is as it is

examples:
  plan --model mistralai/Mixtral-8x7B --gpus 2x24GB
  plan --model ./my-model --gpus 2xrtx4090,1xl4 --prompt 4096 --batch 4
  plan --model gpt2 --gpus 0 --ram 16GB --out plan.json --report placement.html

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
    machine = result.add_argument_group("the machine (what is left out is assumed, and the output says so)")
    machine.add_argument(
        "--gpus", metavar="SPEC", help="2x24GB, 2xrtx4090,1xl4, or 0 for CPU and disk alone (default: 0)"
    )
    machine.add_argument("--ram", metavar="SIZE", help="host memory")
    machine.add_argument("--disk", metavar="SIZE", help="disk for weights that fit nowhere else; 0 for none")
    machine.add_argument(
        "--max-memory", metavar="NAME=SIZE", action="append", default=[],
        help="cap a memory, such as cuda:0=20GiB,cpu=64GB,pinned=16GB; can be repeated",
    )  # fmt: skip
    options.add_work_options(result)
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
    max_memory = options.parse_max_memory(args.max_memory)
    out = options.output_path("--out", args.out, inputs=[args.model])
    page = options.output_path("--report", args.report, inputs=[args.model])
    options.different_paths(out, page)
    with Progress(quiet=args.quiet) as progress:
        plan = _plan(args, max_memory, progress)
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


def _plan(args: argparse.Namespace, max_memory: dict[str, str], progress: Progress) -> Plan:
    from planner.api import plan_model

    return plan_model(
        args.model,
        gpus=args.gpus,
        ram=args.ram,
        disk=args.disk,
        **options.work(args),
        weight_dtype=args.dtype,
        max_memory=max_memory,
        hub=args.hub,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        use_cache=not args.no_cache,
        report=progress.report,
    )


def _tell_written(out: Path | None, page: Path | None) -> None:
    for path in (out, page):
        if path is not None:
            print(f"plan: wrote {path}", file=sys.stderr)
