"""`plan verify plan.json`: checks a saved plan against its own constraints, with no solver."""

from __future__ import annotations

import json
from collections.abc import Sequence

from planner.commands import options
from planner.commands.layout import Page, clean
from planner.errors import PlanFormatError, PlanMismatchError
from planner.models import resolve_model
from planner.plan import Plan
from planner.serial import encode
from planner.verify import verify_plan


def run(argv: Sequence[str]) -> int:
    """Print every constraint that the plan in a file breaks; 0 where it breaks none."""
    parser = options.Parser(
        prog="plan verify",
        description="Check a saved plan: every weight placed once, no memory over its capacity.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="a plan that plan --out wrote")
    parser.add_argument("--model", metavar="NAME", help="also check that the plan is for this model")
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    plan = Plan.load(args.plan)
    if args.model is not None:
        _check_model(plan, args.model)
    violations = verify_plan(plan)
    if args.json:
        told = {"plan": args.plan, "holds": not violations, "violations": encode(violations)}
        options.say_json(json.dumps(told, indent=1, ensure_ascii=False))
    elif violations:
        page = Page(color=False)
        page.paragraph(f"{args.plan} does not hold; constraints broken: {len(violations)}")
        for entry in violations:
            page.paragraph(f"{entry.rule}: {entry.message}", first="  - ")
        options.say(page.text())
    else:
        options.say(f"{clean(args.plan)} holds: every weight is placed once, and no memory is over its capacity")
    return PlanFormatError.exit_code if violations else 0


def _check_model(plan: Plan, name: str) -> None:
    """Raise PlanMismatchError where the config of the model named is not the one that was planned."""
    source = resolve_model(name)
    if source.config_digest != plan.model.config_digest:
        raise PlanMismatchError(
            f"the plan is for {plan.model.id}, whose config is not that of {source.id}; plan again with --model {name}"
        )
