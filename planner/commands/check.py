"""`plan check PLAN.json MEASUREMENT.json`: a plan's predictions beside what `dispatch.measure` found."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from planner.commands import options
from planner.correction import corrected_hardware
from planner.errors import PlanMismatchError
from planner.measurement import Measurement
from planner.plan import Plan
from planner.serial import encode


def run(argv: Sequence[str]) -> int:
    """Print every prediction that was measured; 0 where none is known to be off."""
    parser = options.Parser(
        prog="plan check",
        description="Compare a saved plan's predictions with a measurement that dispatch.measure made.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="a plan that plan --out wrote")
    parser.add_argument("measurement", metavar="MEASUREMENT.json", help="what its Measurement.save wrote")
    parser.add_argument(
        "--correct", metavar="FILE",
        help="write the plan's machine, with the rate that bounds each phase corrected, for --hardware",
    )  # fmt: skip
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    path = options.output_path("--correct", args.correct, inputs=[args.plan, args.measurement])
    plan, measurement = Plan.load(args.plan), Measurement.load(args.measurement)
    check = plan.check(measurement)
    if path is not None:
        corrected_hardware(plan, measurement).save(path)
    if args.json:
        told = {**encode(check), "holds": check.holds}
        options.say_json(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        options.say(f"{check}\n")
    if path is not None:
        print(f"plan: wrote {path}", file=sys.stderr)
    return 0 if check.holds else PlanMismatchError.exit_code
