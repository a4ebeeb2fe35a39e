"""What a plan must keep to and what it may choose: options ↔ the Rules and the objective, in both directions."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

from planner.commands.options import join_words
from planner.errors import InputError, PlanFormatError
from planner.plan import Plan
from planner.rules import DEFAULT_QUALITY_BUDGET, DTYPES, Pin, Rules, Sensitivity
from planner.serial import decode
from planner.workload import Objective, Workload

CACHES = ("dynamic", "static", "fp8", "offloaded")
_AIMS = {
    "latency": "the least time for the whole call",
    "ttft": "the least time to the first token",
    "tpot": "the least time for each token after the first",
    "throughput": "the most tokens a second, the batch chosen for it",
    "fit": "the least memory of GPUs and host together",
    "max-context": "the longest prompt that fits",
    "max-batch": "the largest batch that fits",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options; `choices` reads them back."""
    group = parser.add_argument_group("what to aim for, and what to keep to")
    group.add_argument(
        "--objective", choices=get_args(Objective), metavar="NAME",
        help="latency (the whole call, the default), ttft, tpot, throughput (chooses the batch too), fit (least "
        "memory), max-context, max-batch; a batch or prompt that is searched for is at least the one given",
    )  # fmt: skip
    group.add_argument("--pareto", action="store_true", help="print how time falls as the GPUs' memory grows")
    group.add_argument(
        "--pin", metavar="REGEX=DEVICE", action="append", default=[],
        help="run layers whose whole name matches on a device, such as 'model.layers.[0-3]=cuda:0'; can be repeated",
    )  # fmt: skip
    group.add_argument("--never-disk", action="store_true", help="let no weight wait on disk")
    group.add_argument("--one-node", action="store_true", help="run all layers in one node")
    group.add_argument("--contiguous", action="store_true", help="give each device one stretch of layers")
    group.add_argument("--no-cpu-experts", action="store_true", help="copy experts to GPUs, never compute them in RAM")
    group.add_argument("--time-limit", type=_positive, metavar="SECONDS", help="stop with the best found until then")
    group.add_argument(
        "--quality-budget", type=_amount, metavar="X",
        help=f"the most that chosen precisions may lose (default: {DEFAULT_QUALITY_BUDGET:g}, by the bundled table)",
    )  # fmt: skip
    group.add_argument(
        "--sensitivity",
        metavar="FILE",
        help='a table of losses of your own: JSON, [{"groups": REGEX, "dtype": "int8" or "nf4", "loss": X}, ...]',
    )


def choices(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of `plan_model` for the rules, the objective, the cache, the chunks of the prompt and the
    dtype; what was not said of the last four is left out.
    """
    dtype, dtypes = _dtypes(args.dtype)
    cache, caches = _caches(args.cache)
    chunk, chunks = _chunks(args.prefill_chunk)
    if not dtypes and (args.quality_budget is not None or args.sensitivity is not None):
        raise InputError("--quality-budget and --sensitivity are for weights that may wait in int8 or nf4: add --dtype")
    if args.sensitivity is not None and args.quality_budget is None:
        raise InputError("--sensitivity needs --quality-budget: the most that may be lost, in the unit of your table")
    sensitivity = () if args.sensitivity is None else read_sensitivity(args.sensitivity)
    budget = args.quality_budget
    if budget is None:
        budget = DEFAULT_QUALITY_BUDGET if dtypes else 0.0
    rules = Rules(
        pins=tuple(_pin(text) for text in args.pin),
        never_on_disk=args.never_disk,
        never_across_nodes=args.one_node,
        contiguous=args.contiguous,
        cpu_experts=not args.no_cpu_experts,
        dtypes=dtypes,
        caches=caches,
        prefill_chunks=chunks,
        quality_budget=budget,
        sensitivity=sensitivity,
        time_limit_s=args.time_limit,
    )
    said = {"objective": args.objective, "cache": cache, "weight_dtype": dtype}
    cut = {} if args.prefill_chunk is None else {"prefill_chunk": chunk}
    return {"rules": rules, **cut, **{name: value for name, value in said.items() if value is not None}}


def read_sensitivity(path: str) -> tuple[Sensitivity, ...]:
    """Return the table in a file.

    Raises:
        InputError: the file cannot be read, or is no such table; the message says where.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, list) or not data:
            raise InputError(f"--sensitivity {path}: must hold a JSON list of groups, dtype and loss, not empty")
        table = tuple(decode(Sensitivity, entry, where=f"entry {i}") for i, entry in enumerate(data))
    except OSError as exc:
        raise InputError(f"cannot read --sensitivity {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"--sensitivity {path} is not JSON: {exc}") from exc
    except PlanFormatError as exc:
        raise InputError(f"--sensitivity {path}: {exc}") from exc
    return table


def aim(work: Workload) -> str:
    """Return the objective in words."""
    return _AIMS[work.objective]


def words(plan: Plan) -> str:
    """Return the rules of a plan in words; nothing where there are none."""
    rules = plan.rules
    said = [f"{pin.layers} on {pin.device}" for pin in rules.pins]
    said += ["nothing on disk"] * rules.never_on_disk
    said += ["all in one node"] * rules.never_across_nodes
    said += ["one stretch of layers for each device"] * rules.contiguous
    said += ["no experts computed on the CPU"] * (not rules.cpu_experts)
    if rules.dtypes:
        said.append(f"weights may wait in {join_words(rules.dtypes, 'or')}, losing at most {rules.quality_budget:g}")
        said += ["by a table of losses that was given"] * bool(rules.sensitivity)
    if rules.caches:
        said.append(f"the KV cache may be {join_words(rules.caches, 'or')}")
    if rules.prefill_chunks:
        cuts = ["at once" if cut is None else f"in chunks of {cut:,}" for cut in rules.prefill_chunks]
        said.append(f"the prompt may be taken {join_words(cuts, 'or')}")
    if rules.time_limit_s is not None:
        said.append(f"within {rules.time_limit_s:g} s")
    return ", ".join(said)


def _dtypes(text: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the dtype to compute in (None: the checkpoint's) and those that weights may wait in besides."""
    if text is None:
        return None, ()
    first, *others = (name.strip() for name in text.split(","))
    if first == "choose" and not others:
        return None, DTYPES
    if first in DTYPES or first == "choose":
        raise InputError(
            f"--dtype {text}: the first is what the model computes in (bfloat16, float16 or float32), others are what "
            "weights may wait in, such as bfloat16,int8,nf4; --dtype choose allows all"
        )
    for name in others:
        if name not in DTYPES:
            raise InputError(f"--dtype {text}: weights may wait in {join_words(DTYPES, 'or')}, not in {name!r}")
    return first, tuple(dict.fromkeys(others))


def _caches(text: str | None) -> tuple[str | None, tuple[Any, ...]]:
    """Return the cache of the work (None: the default), and all that are allowed where there are several."""
    if text is None:
        return None, ()
    names = CACHES if text.strip() == "choose" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in CACHES:
            raise InputError(f"--cache {text}: there are {', '.join(CACHES)}, and choose; not {name!r}")
    return names[0], names if len(names) > 1 else ()


def _chunks(text: str | None) -> tuple[int | None, tuple[int | None, ...]]:
    """Return the chunk of the work (None: the prompt at once), and all that are allowed where there are several."""
    if text is None:
        return None, ()
    found: dict[int | None, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if name != "none" and re.fullmatch(r"0*[1-9][0-9]{0,8}", name) is None:
            raise InputError(
                f"--prefill-chunk {text}: write tokens of the prompt in one forward call, such as 256, none, or a list "
                f"to choose from, such as none,256,1024; not {name!r}"
            )
        found[None if name == "none" else int(name)] = None
    cuts = tuple(found)
    return cuts[0], cuts if len(cuts) > 1 else ()


def _pin(text: str) -> Pin:
    layers, equals, device = (part.strip() for part in text.rpartition("="))
    if not layers or not equals or not device:
        raise InputError(f"--pin {text}: write REGEX=DEVICE, such as 'model.layers.[0-3]=cuda:0'")
    return Pin(layers=layers, device=f"cuda:{int(device)}" if device.isascii() and device.isdigit() else device)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number from 0 up; got {text!r}")
    return value


def _positive(text: str) -> float:
    value = _amount(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than nothing")
    return value
