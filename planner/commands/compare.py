"""`plan compare --model X --device-map FILE.json`: our placement beside others', under our engine and Accelerate's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner import phrases
from planner.commands import options
from planner.commands.layout import Page, parameters_words
from planner.commands.progress import Progress
from planner.errors import InfeasibleError, InputError
from planner.hardware import Hardware
from planner.plan import Plan
from planner.serial import encode
from planner.units import format_bytes, format_ns

if TYPE_CHECKING:
    from simulate import Timeline

AUTO = "Accelerate's auto map"
_COLUMNS = (24, 26, 9, 10, 11)
_ENGINES = {"loadplan": "by Loadplan's engine", "accelerate": "by Accelerate's hooks"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One placement under one engine.

    peak_bytes: of each memory. over_bytes: beyond what is usable, of those that are overfull; none: it fits.
    fullest: the GPU or host of whose memory the largest part is used; share: that part.
    load_ns: reading the checkpoint; None where the engine's own way to load is not modelled.
    assumed: what the row takes for granted, beside the machine's assumptions.
    """

    placement: str
    engine: Literal["loadplan", "accelerate"]
    peak_bytes: dict[str, int]
    over_bytes: dict[str, int]
    fullest: str
    share: float
    load_ns: int | None
    prefill_ns: int
    decode_ns_per_token: int
    total_ns: int
    assumed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """rows: ours first. left_out: what could not be compared, and why. assumptions: of the machine and the work."""

    model: str
    num_parameters: int
    weight_dtype: str
    work: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    assumptions: tuple[str, ...]


def run(argv: Sequence[str]) -> int:
    """Place, simulate, then print the table."""
    args = _parser().parse_args(options.join_negatives(argv))
    hardware = options.hardware(args)
    maps = {path: read_map(path) for path in args.device_map}
    with Progress(quiet=args.quiet) as progress:
        found = _compare(args, hardware, maps, progress)
    if args.json:
        options.say_json(json.dumps(encode(found), indent=1, ensure_ascii=False))
        return 0
    options.say(render(found, color=options.wants_color(args.color)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="plan compare",
        description="Compare our placement with device maps, each run by our engine and by Accelerate's own hooks.",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a model's name, or a folder with its config")
    parser.add_argument(
        "--device-map", action="append", default=[], metavar="FILE",
        help='a JSON object of modules and places, {"model.layers.0": 0, "lm_head": "cpu"}; can be repeated',
    )  # fmt: skip
    parser.add_argument(
        "--no-auto", action="store_true", help="leave out the map that Accelerate makes itself, where it is installed"
    )
    options.add_machine_options(parser)
    options.add_work_options(parser)
    options.add_source_options(parser)
    options.add_color_option(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--no-cache", action="store_true", help="neither use nor keep answers on disk")
    options.add_output_options(parser)
    return parser


def read_map(path: str) -> dict[str, int | str]:
    """Return the device map in a JSON file.

    Raises:
        InputError: the file cannot be read, or is no object of names and places.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the device map {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    except (json.JSONDecodeError, RecursionError) as exc:
        raise InputError(f"{path} is not a device map: it is not JSON ({exc})") from exc
    if not isinstance(found, dict) or not all(isinstance(place, (int, str)) for place in found.values()):
        raise InputError(
            f'{path} is not a device map: write one object of modules and places, {{"model.layers.0": 0, "": "cpu"}}'
        )
    return found


def _compare(
    args: argparse.Namespace, hardware: Hardware, maps: Mapping[str, Mapping[str, int | str]], progress: Progress
) -> Comparison:
    from planner.api import plan_from_device_map, plan_model
    from planner.workload import Workload

    work = Workload(**options.work(args))
    asked: dict[str, Any] = {
        "hardware": hardware, "workload": work, "weight_dtype": args.dtype, "hub": args.hub, "revision": args.revision,
        "trust_remote_code": args.trust_remote_code, "use_cache": not args.no_cache, "report": progress.report,
    }  # fmt: skip
    rows: list[Row] = []
    left_out: list[str] = []
    plans: list[Plan] = []
    try:
        plans.append(plan_model(args.model, **asked))
        rows.append(_ours("Loadplan", plans[0]))
    except InfeasibleError as exc:
        left_out.append(f"Loadplan: {exc}")
    named = dict(maps)
    if not args.no_auto:
        try:
            progress.report("asking Accelerate")
            named = {AUTO: _auto(args, hardware), **named}
        except InputError as exc:
            left_out.append(f"{AUTO}: {exc}")
    for name, device_map in named.items():
        plans.append(plan_from_device_map(args.model, device_map, **asked))
        rows.append(_ours(name, plans[-1]))
        rows.append(_theirs(name, plans[-1], device_map))
    if not rows:
        raise InputError(f"there is nothing to compare: {'; '.join(left_out)}")
    plan = plans[0]
    return Comparison(
        model=plan.model.id,
        num_parameters=plan.model.num_parameters,
        weight_dtype=plan.model.weight_dtype,
        work=phrases.work(plan),
        rows=tuple(rows),
        left_out=tuple(left_out),
        assumptions=hardware.assumptions,
    )


def _auto(args: argparse.Namespace, hardware: Hardware) -> dict[str, int | str]:
    from planner.accelerate_map import auto_map
    from planner.given import build_on_meta, dtype_of, source_of

    source, _ = source_of(args.model, hub=args.hub, revision=args.revision, trust_remote_code=args.trust_remote_code)
    dtype = dtype_of(args.dtype, source, None, None, [])
    return auto_map(build_on_meta(source, dtype, trust_remote_code=args.trust_remote_code), hardware)


def _ours(name: str, plan: Plan) -> Row:
    """Return a plan's row as our engine runs it."""
    import simulate
    from planner import memory

    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    peaks = {pool.name: planned[pool.name].total for pool in plan.hardware.pools}
    limit = plan.hardware.pinned_limit_bytes
    pinned = memory.pinned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    over_pinned = 0 if limit is None else max(pinned.values()) - limit
    assert plan.prediction is not None
    if plan.solver is None:
        notes = (note for note in plan.assumptions if " that the map " in note)
        assumed: tuple[str, ...] = ("pinned copies, prefetched into slots", *notes)
    else:
        assumed = ("placed by the planner; pinned copies, prefetched into slots, of experts those that are routed to",)
    return _row(
        name, "loadplan", plan, simulate.run(plan), peaks, {"pinned": over_pinned}, plan.prediction.load_ns, assumed
    )


def _theirs(name: str, plan: Plan, device_map: Mapping[str, int | str]) -> Row:
    """Return a device map's row as Accelerate's hooks run it."""
    import simulate

    timeline = simulate.run_accelerate(plan, device_map)
    peaks = {pool.name: timeline.peak_bytes(pool.name) for pool in plan.hardware.pools}
    fraction = plan.hardware.pageable_fraction
    assumed = (
        f"copies one by one at {fraction:.0%} of a link, from pageable memory; all experts of a layer; the hooks' own "
        "time as measured on a CPU",
    )
    return _row(name, "accelerate", plan, timeline, peaks, {}, None, assumed)


def _row(
    name: str,
    engine: Literal["loadplan", "accelerate"],
    plan: Plan,
    timeline: Timeline,
    peaks: dict[str, int],
    more_over: dict[str, int],
    load_ns: int | None,
    assumed: tuple[str, ...],
) -> Row:
    usable = {pool.name: pool.usable_bytes for pool in plan.hardware.pools}
    over = {pool: nbytes - usable[pool] for pool, nbytes in peaks.items()} | more_over
    disks = {plan.hardware.disk(pool) for pool in usable}
    shares = {pool: peaks[pool] / usable[pool] for pool in peaks if pool not in disks and usable[pool]}
    fullest = max(shares, key=lambda pool: shares[pool])
    return Row(
        placement=name,
        engine=engine,
        peak_bytes=peaks,
        over_bytes={pool: nbytes for pool, nbytes in over.items() if nbytes > 0},
        fullest=fullest,
        share=round(shares[fullest], 4),
        load_ns=load_ns,
        prefill_ns=timeline.prefill_ns,
        decode_ns_per_token=timeline.decode_ns_per_token,
        total_ns=timeline.total_ns,
        assumed=assumed,
    )


def render(found: Comparison, *, color: bool = False) -> str:
    """Return the comparison as text, no line wider than 80 columns."""
    page = Page(color=color)
    page.paragraph(found.model, style="bold")
    page.paragraph(f"{parameters_words(found.num_parameters)} parameters in {found.weight_dtype}, {found.work}")
    page.line()
    page.line(_line(("", "fits (fullest memory)", "load", "prefill", "a token")), "dim")
    shown = None
    for row in found.rows:
        label = f"  {_ENGINES[row.engine]}"
        if row.placement == "Loadplan":
            label = "Loadplan"
        elif row.placement != shown:
            page.line(row.placement)
        shown = row.placement
        page.line(_line((label, *_cells(row))), "bad" if row.over_bytes else None)
    if found.left_out:
        page.heading("Not compared")
        for text in found.left_out:
            page.paragraph(text, first="  - ")
    page.heading("Assumptions")
    told: dict[str, list[str]] = {}
    for row in found.rows:
        for note in row.assumed:
            who = row.placement if row.placement == "Loadplan" else f"{row.placement}, {_ENGINES[row.engine]}"
            told.setdefault(note, []).append(who)
    for note, names in told.items():
        page.paragraph(f"{'; '.join(names)}: {note}", first="  - ", style="dim")
    if any(row.over_bytes for row in found.rows):
        page.paragraph("times of what does not fit are those it would take if it did", first="  - ", style="dim")
    for note in found.assumptions:
        page.paragraph(note, first="  - ", style="dim")
    return page.text()


def _cells(row: Row) -> tuple[str, ...]:
    if row.over_bytes:
        worst = max(row.over_bytes, key=lambda name: row.over_bytes[name])
        more = f", +{len(row.over_bytes) - 1}" if len(row.over_bytes) > 1 else ""
        fits = f"no: {worst} by {format_bytes(row.over_bytes[worst])}{more}"
    else:
        fits = f"yes: {row.fullest} {int(row.share * 100)}%"
    load = "" if row.load_ns is None else format_ns(row.load_ns)
    token = format_ns(row.decode_ns_per_token) if row.decode_ns_per_token else ""
    return fits, load, format_ns(row.prefill_ns), token


def _line(cells: Sequence[str]) -> str:
    words = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, _COLUMNS, strict=True))
    ]
    return "".join(words)
