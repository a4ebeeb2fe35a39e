"""`plan memory --model X`: what a model takes on one device, phase by phase, before any plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.commands import options
from planner.commands.layout import Page
from planner.commands.progress import Progress
from planner.serial import encode
from planner.units import GB, MB
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.footprint import MemoryPrediction, PhaseMemory

_COLUMNS = ("made by operators", "requested", "allocated", "reserved")


def run(argv: Sequence[str]) -> int:
    """Predict, then print."""
    parser = options.Parser(
        prog="plan memory", description="Predict what a model takes on one device: every counter, phase by phase."
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a model's name, or a folder with its config")
    machine = parser.add_argument_group("the device")
    machine.add_argument("--gpu", metavar="PRODUCT", help="a product of `plan gpus`; the CPU where none is named")
    machine.add_argument("--threads", type=options.count, metavar="N", help="of the CPU (default: as torch is set)")
    options.add_work_options(parser)
    options.add_source_options(parser)
    options.add_color_option(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options.add_output_options(parser)
    args = parser.parse_args(options.join_negatives(argv))
    with Progress(quiet=args.quiet) as progress:
        progress.report("loading torch")
        from planner.api import predict_memory

        predicted = predict_memory(
            args.model,
            Workload(**options.work(args)),
            gpu=args.gpu,
            threads=args.threads,
            weight_dtype=args.dtype,
            hub=args.hub,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            report=progress.report,
        )
    if args.json:
        options.say_json(json.dumps(encode(predicted), indent=1))
        return 0
    options.say(render(predicted, args.model, Workload(**options.work(args)), color=options.wants_color(args.color)))
    return 0


def render(predicted: MemoryPrediction, name: str, work: Workload, *, color: bool) -> str:
    """Return the prediction as text of at most 80 columns."""
    page = Page(color=color)
    unit, word = (GB, "GB (10^9 bytes)") if predicted.peak.requested_bytes >= GB else (MB, "MB (10^6 bytes)")
    page.line(f"{name} on {predicted.device}", "bold")
    if predicted.decode or work.new_tokens == 1:
        said = f"prompt {work.prompt_tokens:,} tokens, {work.new_tokens:,} new, {_asked(work)}"
    else:
        said = "one forward call"
    page.paragraph(f"batch {work.batch_size}, {said}", first="")
    page.line(f"The most at once, in {word}")
    page.line()
    columns = _COLUMNS if predicted.peak.reserved_bytes is not None else _COLUMNS[:2]
    page.line(
        f"{'':14}" + "".join(f"{column:>19}" if at == 0 else f"{column:>12}" for at, column in enumerate(columns))
    )
    rows = [("prefill", predicted.prefill)]
    if predicted.decode:
        rows.append(("first decode", predicted.decode[0]))
    if len(predicted.decode) > 1:
        rows.append(("last decode", predicted.decode[-1]))
    for label, phase in rows:
        page.line(_row(label, phase, unit))
    page.line(_row("peak", predicted.peak, unit), "good")
    page.line()
    parts = predicted.peak.parts
    page.line(
        f"of the peak    weights {parts.weights / unit:,.3f}, KV cache {parts.kv_cache / unit:,.3f}, "
        f"activations {parts.activations / unit:,.3f},"
    )
    page.line(f"{'':15}kernels' scratch {parts.scratch / unit:,.3f}, libraries {parts.library / unit:,.3f}")
    if predicted.device_used_bytes is not None:
        page.line(f"device used    {predicted.device_used_bytes / unit:,.3f}, with the CUDA context")
    if predicted.expected_peak is not None:
        page.line(f"expected peak  {predicted.expected_peak.requested_bytes / unit:,.3f} requested, routed evenly")
    page.heading("Assumptions")
    notes = [*predicted.assumptions]
    if predicted.unmodelled:
        notes.append(f"scratch not modelled of {', '.join(predicted.unmodelled)}")
    notes.append("made by operators: without weights; the caller's own inputs are in no figure")
    for note in notes:
        page.paragraph(note, first="  - ", style="dim")
    return page.text()


def _asked(work: Workload) -> str:
    words = [work.caller, "sampling" if work.sampling == "sample" else "greedy"]
    if work.top_p is not None:
        words.append(f"top-p {work.top_p:g}")
    if work.num_beams > 1:
        words.append(f"{work.num_beams} beams")
    if work.num_return_sequences > 1:
        words.append(f"{work.num_return_sequences} answers")
    if work.prefill_chunk is not None:
        words.append(f"chunks of {work.prefill_chunk:,}")
    return ", ".join([*words, f"{work.cache} cache"])


def _row(label: str, phase: PhaseMemory, unit: int) -> str:
    figures = [phase.operator_output_bytes, phase.requested_bytes, phase.allocated_bytes, phase.reserved_bytes]
    known = [figure for figure in figures if figure is not None]
    return f"{label:14}" + "".join(
        f"{figure / unit:19,.3f}" if at == 0 else f"{figure / unit:12,.3f}" for at, figure in enumerate(known)
    )
