"""Predictions held against measurements: published by others, of this machine as calibrated, and of virtual devices.

python benchmarks/validation.py [--json] [--only TEXT] [--out FILE]

Each row says what was predicted, what was measured, and by how much the prediction is off. Of published rows
(published.csv, published_more.csv, each with its source) those whose inputs are all stated are scored apart from those
that an assumption was made for, and what runs under an engine that is not modelled is listed. The host is an input of
what it is seen to decide: where operators at twice the price change a prediction by more than a hundredth.

No constant is chosen by what stands here.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import gc
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas

import planner
import simulate
from machine import describe
from planner import memory
from planner.accelerate_map import auto_map
from planner.given import build_on_meta, source_of
from planner.hardware import Hardware
from planner.plan import Plan
from planner.units import GB, GIB
from planner.workload import Workload

HERE = Path(__file__).parent
FILES = ("published.csv", "published_more.csv")
GPUS = {
    "2x Titan RTX 24GB": "2xtitanrtx", "1x T4 16GB": "1xt4", "1x RTX A5000 24GB": "1xa5000", "1x H200": "1xh200",
    "1x A100 80GB": "1xa100-80gb",
}  # fmt: skip
# What Accelerate's README says each memory held (GPU 0, GPU 1, host), in its "GB": placements are inputs, and these
# are what is told of them.
HELD = {
    "acc-gptj-fp16": (11.7, 0.0, 0.0), "acc-gptj-fp32": (21.9, 1.5, 0.0), "acc-neox-fp16": (21.5, 18.0, 0.0),
    "acc-neox-fp32-disk": (20.3, 22.7, 24.4), "acc-opt30-fp16": (20.7, 22.3, 14.1),
    "acc-opt30-fp32-disk": (20.2, 21.2, 23.5),
}  # fmt: skip
# Lengths where none are told: a short prompt, and generate's default of 20 tokens in all.
SHORT = {"prompt_tokens": 8, "new_tokens": 12}
NOT_MODELLED = ("deepspeed", "flexgen", "moe-infinity")
# A change of a prediction that makes the host one of its inputs.
HOST_MATTERS = 0.01

Inputs = Literal["stated", "assumed", "none"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """error: predicted / measured - 1. inputs: whether all are stated, some assumed, or it is not scored: there is no
    prediction, or it was made of this measurement.

    note: what was assumed, or why it is not scored.
    decided_by: of times, whether copies of weights decide it, the host's time for operators, or the device.
    implied_operator_us: of rows that the host decides, what an operator would have to cost for the row to be right.
    """

    id: str
    kind: Literal["published", "calibrated", "virtual"]
    metric: str
    unit: str
    predicted: float | None
    measured: float
    error: float | None
    inputs: Inputs
    note: str
    source: str = ""
    decided_by: Literal["copies", "host", "device"] | None = None
    implied_operator_us: float | None = None


def row(entry: Mapping[str, str], predicted: float, notes: Iterable[str]) -> Row:
    told = "; ".join(notes)
    return listed(entry, told, predicted=predicted, inputs="assumed" if told else "stated")


def listed(entry: Mapping[str, str], note: str, *, predicted: float | None = None, inputs: Inputs = "none") -> Row:
    measured = float(entry["value"])
    return Row(
        id=entry["id"], kind="published", metric=entry["metric"], unit=entry["unit"],
        predicted=predicted and round(predicted, 5), measured=measured,
        error=None if predicted is None else round(predicted / measured - 1, 4), inputs=inputs, note=note,
        source=entry["source"],
    )  # fmt: skip


# Published


def published(only: str) -> list[Row]:
    """Return the rows of the files whose id holds `only`."""
    found = []
    for entry in _entries():
        if only in entry["id"]:
            print(f"validation: {entry['id']}", file=sys.stderr)
            found.append(_of(entry))
            gc.collect()
    return found


def _entries() -> list[dict[str, str]]:
    return [entry for name in FILES for entry in csv.DictReader((HERE / name).read_text().splitlines())]


def _of(entry: Mapping[str, str]) -> Row:
    engine, metric = entry["engine"], entry["metric"]
    if engine.startswith(NOT_MODELLED):
        return listed(entry, f"{engine}: an engine that is not modelled")
    if metric in ("gemm", "device copy"):
        return _rate(entry)
    if metric in ("gpu0_weights", "all_weights"):
        return _weights(entry)
    if metric == "gpu_memory":
        return _allocated(entry)
    if engine.startswith("accelerate"):
        return _accelerate(entry)
    if engine.startswith("transformers"):
        return _resident(entry)
    return listed(entry, f"{engine}: an engine that is not modelled")


def _machine(entry: Mapping[str, str]) -> Hardware:
    ram = entry["host"].split(" GB")[0] if " GB" in entry["host"] else "256"
    return Hardware.from_options(GPUS[entry["gpus"]], ram=f"{ram}GB")


def _rate(entry: Mapping[str, str]) -> Row:
    """Return the catalogue's achieved rate beside the one that was measured, which it was taken from: not scored."""
    (gpu,) = _machine(entry).gpus
    rate = gpu.flops_for(entry["weight_dtype"]) / 1e12 if entry["metric"] == "gemm" else gpu.bytes_per_s / GB
    return listed(entry, "the catalogue's achieved fraction is this measurement, rounded", predicted=rate)


def _weights(entry: Mapping[str, str]) -> Row:
    """Return the bytes of parameters and buffers, in the unit that the source's figure can be in."""
    model = _model(entry["model"], entry["weight_dtype"])
    return row(entry, _nbytes([*model.parameters(), *model.buffers()]) / _unit(entry["source"]), ())


@functools.cache
def _model(name: str, dtype: str) -> Any:
    source, _ = source_of(name, hub=False, revision=None, trust_remote_code=False)
    return build_on_meta(source, dtype)


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@functools.cache
def _unit(source: str) -> int:
    """Return what a source's GB are: 2^30 bytes where any of its figures is less than the parameters in 10^9."""
    same = [entry for entry in _entries() if entry["source"].partition(" (")[0] == source.partition(" (")[0]]
    for entry in same:
        if entry["unit"] == "GB":
            nbytes = _nbytes(_model(entry["model"], entry["weight_dtype"]).parameters())
            if float(entry["value"]) * GB < nbytes:
                return GIB
    return GB


def _allocated(entry: Mapping[str, str]) -> Row:
    """Return the most that the caching allocator hands out during the call."""
    gpu = GPUS[entry["gpus"]].partition("x")[2]
    found = planner.predict_memory(entry["model"], _work(entry), gpu=gpu, weight_dtype=entry["weight_dtype"])
    assert found.peak.allocated_bytes is not None
    notes = ("the counter is the allocator's most allocated bytes", _attention(entry, found.attention))
    return row(entry, found.peak.allocated_bytes / _unit(entry["source"]), notes)


def _attention(entry: Mapping[str, str], ours: str | None) -> str:
    return f"attention as {ours} runs it, for {entry['engine'].partition(' with ')[2]}"


def _work(entry: Mapping[str, str]) -> Workload:
    lengths = {name: int(entry[name]) for name in ("prompt_tokens", "new_tokens") if entry[name]}
    return Workload(batch_size=int(entry["batch_size"]), **{**SHORT, **lengths})


def _resident(entry: Mapping[str, str]) -> Row:
    """Return tokens per second of a model that is wholly on one GPU, which costs our engine what it costs any."""
    plan = _plan(entry, _machine(entry), {"": 0}, _work(entry))
    return _timed(entry, plan, simulate.run, (_attention(entry, plan.execution.attention),))


def _accelerate(entry: Mapping[str, str]) -> Row:
    if not entry["batch_size"]:
        return listed(entry, "the batch is not stated, and decides the throughput")
    hardware, work = _machine(entry), _work(entry)
    notes = [] if entry["prompt_tokens"] else [f"{work.prompt_tokens} tokens in, {work.new_tokens} out"]
    if " GB" not in entry["host"]:
        notes.append("256 GB of host memory")
    held = HELD.get(entry["id"])
    if held is not None:
        device_map = _in_order(_plan(entry, hardware, {"": "cpu"}, work), held)
        notes.append("placed in order, up to what the source says each memory held")
    else:
        device_map = _with_room(entry, hardware, work)
        notes.append("Accelerate's auto map, with room for cache and activations")
    places = set(device_map.values())
    plan = _plan(entry, hardware, device_map, work)
    if "cpu" in places or "disk" in places:
        notes.append(f"pageable copies at {hardware.pageable_fraction:.0%} of {_link_gb(hardware):.1f} GB/s")
    if "disk" in places:
        notes.append(f"a disk of {hardware.link('disk', 'cpu').bytes_per_s / GB:.1f} GB/s")
    return _timed(entry, plan, lambda each: simulate.run_accelerate(each, device_map), notes)


def _link_gb(hardware: Hardware) -> float:
    return hardware.link("cpu", "cuda:0").bytes_per_s / GB


def _plan(entry: Mapping[str, str], hardware: Hardware, device_map: Mapping[str, int | str], work: Workload) -> Plan:
    return planner.plan_from_device_map(
        entry["model"], device_map, hardware=hardware, workload=work, weight_dtype=entry["weight_dtype"]
    )


def _in_order(plan: Plan, held: tuple[float, float, float]) -> dict[str, int | str]:
    """Return a map that fills one memory after another with layers, up to so many GiB, and the disk with the rest."""
    room = dict(zip((0, 1, "cpu"), (int(size * GIB) for size in held), strict=True))
    tied = plan.graph.tied_to_earlier()
    found: dict[str, int | str] = {"": 0}
    open_places: list[int | str] = [0, 1, "cpu", "disk"]
    for index, layer in enumerate(plan.graph.layers):
        own = [(name, tensor) for at, _, name, tensor in plan.graph.tensors() if at == index]
        nbytes = sum(tensor.nbytes for name, tensor in own if name not in tied)
        while open_places[0] != "disk" and room[open_places[0]] < nbytes:
            open_places.pop(0)
        place = open_places[0]
        # What is told of the host is the part that waits there, to a tenth: nothing is left over for a disk.
        if place == "disk" and held[2] and not _uses_disk(plan, held):
            place = "cpu"
        elif place != "disk":
            room[place] -= nbytes
        found[layer.name] = place
    return found


def _uses_disk(plan: Plan, held: tuple[float, float, float]) -> bool:
    return plan.graph.weight_bytes > sum(held) * GIB


def _with_room(entry: Mapping[str, str], hardware: Hardware, work: Workload) -> dict[str, int | str]:
    """Return Accelerate's map of what the first GPU has left beside cache, activations and the largest module."""
    plan = _plan(entry, hardware, {"": "cpu"}, work)
    first = plan.graph.layers[0].name
    beside = simulate.run_accelerate(plan, {"": "cpu", first: 0}).peak_bytes("cuda:0")
    left = hardware.pool("cuda:0").usable_bytes - beside
    return auto_map(_model(entry["model"], entry["weight_dtype"]), hardware.with_max_memory({"cuda:0": max(left, 1)}))


def _timed(entry: Mapping[str, str], plan: Plan, run: Callable[[Plan], simulate.Timeline], notes: Iterable[str]) -> Row:
    """Return the row of a plan's time, with the host among its assumptions where operators' price decides it."""
    slower = tuple(
        dataclasses.replace(device, operator_ns=2 * device.operator_ns) if device.kind != "cpu" else device
        for device in plan.hardware.devices
    )
    other = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, devices=slower))
    found, with_slower = (_value(entry, each, run(each)) for each in (plan, other))
    if abs(with_slower / found - 1) <= HOST_MATTERS:
        streams = any(placement.home != placement.run_on for placement in plan.placements)
        return dataclasses.replace(row(entry, found, notes), decided_by="copies" if streams else "device")
    price = plan.hardware.gpus[0].operator_ns / 1000
    told = row(entry, found, [*notes, f"{price:g} us of host an operator"])
    return dataclasses.replace(told, decided_by="host", implied_operator_us=round(_implied(entry, plan, run), 1))


def _implied(entry: Mapping[str, str], plan: Plan, run: Callable[[Plan], simulate.Timeline]) -> float:
    """Return the price of an operator, in us, at which the prediction is what was measured, by bisection."""
    grows = entry["metric"] == "decode"
    low, high = 0, 200_000
    while high - low > 50:
        middle = (low + high) // 2
        devices = tuple(dataclasses.replace(device, operator_ns=middle) for device in plan.hardware.devices)
        other = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, devices=devices))
        is_slower = (_value(entry, other, run(other)) > float(entry["value"])) == grows
        low, high = (low, middle) if is_slower else (middle, high)
    return high / 1000


def _value(entry: Mapping[str, str], plan: Plan, timeline: simulate.Timeline) -> float:
    """Return a timeline's figure in the metric and unit of a row."""
    if entry["metric"] == "decode":
        return timeline.decode_ns_per_token / 1e9
    assert entry["metric"] == "throughput"
    return plan.workload.rows * plan.workload.new_tokens * 1e9 / timeline.total_ns


# Virtual


def virtual(only: str) -> list[Row]:
    """Return bytes of Mixtral at full size as pretend GPUs counted them, beside what its plan says."""
    if only not in "virtual-mixtral":
        return []
    import torch

    import dispatch

    name, prompt, new = "mistralai/Mixtral-8x7B-v0.1", 64, 3
    rules = planner.Rules(cpu_experts=False)
    plan = planner.plan_model(name, gpus="2x24GB", prompt_tokens=prompt, new_tokens=new, rules=rules)
    held = memory.static_usage(plan.graph, plan.hardware, plan.placements, plan.slots)
    outputs = memory.operator_outputs(plan.graph, plan.placements)
    source, _ = source_of(name, hub=False, revision=None, trust_remote_code=False)
    with simulate.virtual("2x24GB", numbers=False) as box:
        model = dispatch.apply(box.blank(build_on_meta(source, "bfloat16").eval()), plan, devices=box.devices)
        loaded = {device: box.live_bytes(device) for device in box.devices}
        ids = torch.ones(1, prompt, dtype=torch.long, device=box.devices["cuda:0"])
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        peaks = {device: box.peak_bytes(device) for device in box.devices}
    found = []
    for device in loaded:
        resident = held[device].weights + held[device].slots
        figures = (("weights", resident, loaded[device]), ("peak", resident + outputs[device], peaks[device]))
        for metric, predicted, measured in figures:
            found.append(
                Row(
                    id=f"virtual-mixtral-{device}-{metric}", kind="virtual", metric=metric, unit="bytes",
                    predicted=predicted, measured=measured, error=round(predicted / measured - 1, 6), inputs="stated",
                    note="", source="this run",
                )
            )  # fmt: skip
    return found


# Calibrated


def calibrated(only: str) -> list[Row]:
    """Return the rows of what this machine was predicted to take and took, where that benchmark is there.

    `validation_calibrated.rows()` gives dicts with at least id, metric, predicted and measured.
    """
    try:
        module = importlib.import_module("validation_calibrated")
    except ModuleNotFoundError:
        return []
    known = {field.name for field in dataclasses.fields(Row)}
    found = []
    for each in module.rows():
        given = dict(each) if isinstance(each, Mapping) else dataclasses.asdict(each)
        given = {"unit": "s", "inputs": "stated", "note": "", "source": "this machine", **given, "kind": "calibrated"}
        given.setdefault("error", round(given["predicted"] / given["measured"] - 1, 4))
        if only in given["id"]:
            found.append(Row(**{name: value for name, value in given.items() if name in known}))
    return found


# What is told


def summary(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Return how many rows, how far off and in what order, for each kind, what it is of, and how its inputs are known.

    Times are apart by what decides them: no source says what host it was.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for each in rows:
        if each.error is not None and each.inputs != "none":
            groups.setdefault((each.kind, _family(each), each.inputs), []).append(each)
    found: list[dict[str, object]] = []
    for (kind, family, inputs), members in sorted(groups.items()):
        errors = {each.id: abs(each.error) for each in members if each.error is not None}
        worst = max(errors, key=lambda name: errors[name])
        found.append(
            {
                "kind": kind, "family": family, "inputs": inputs, "rows": len(members),
                "median_error": round(statistics.median(errors.values()), 4), "worst_error": round(errors[worst], 4),
                "worst": worst, "rank_correlation": _rank_correlation(members),
            }
        )  # fmt: skip
    return found


def _family(each: Row) -> str:
    if each.unit in ("GB", "bytes"):
        return "memory"
    return f"{each.decided_by} time" if each.decided_by else "time"


def _rank_correlation(members: list[Row]) -> float | None:
    """Return Spearman's, over three rows at least, of seconds a token and bytes: what is more has the higher rank."""
    if len(members) < 3:
        return None
    pairs = [
        (1 / each.predicted, 1 / each.measured) if each.unit == "tokens/s" else (each.predicted, each.measured)
        for each in members
        if each.predicted
    ]
    frame = pandas.DataFrame(pairs).rank()
    return round(float(frame[0].corr(frame[1])), 3)


def table(rows: list[Row], groups: list[dict[str, object]]) -> str:
    """Return rows and summary as text of at most 80 columns."""
    lines = []
    for inputs, heading in (
        ("stated", "All inputs stated"), ("assumed", "With assumptions"), ("none", "Not scored"),
    ):  # fmt: skip
        members = [each for each in rows if each.inputs == inputs]
        if not members:
            continue
        lines += [heading, f"  {'':28}{'metric':14}{'predicted':>12}{'measured':>12}{'error':>10}"]
        notes: dict[str, list[str]] = {}
        for each in members:
            told = "" if each.predicted is None else f"{each.predicted:.5g}"
            off = "" if each.error is None else f"{each.error:+.1%}"
            lines.append(f"  {each.id[:27]:28}{each.metric[:13]:14}{told:>12}{each.measured:>12.5g}{off:>10}")
            if each.note:
                implied = each.implied_operator_us
                told = each.id if implied is None else f"{each.id} (right at {implied:g} us)"
                notes.setdefault(each.note, []).append(told)
        for note, names in notes.items():
            lines += _folded(f"{', '.join(names)}: {note}")
        lines.append("")
    head = f"  {'':12}{'':13}{'inputs':9}{'rows':>5}{'median':>9}{'worst':>9}{'rank':>7}  worst row"
    lines += ["Errors, absolute", head]
    for each in groups:
        rank = "" if each["rank_correlation"] is None else f"{each['rank_correlation']:.2f}"
        lines.append(
            f"  {each['kind']:12}{each['family']:13}{each['inputs']:9}{each['rows']:5}{each['median_error']:9.2%}"
            f"{each['worst_error']:9.2%}{rank:>7}  {str(each['worst'])[:12]}"
        )
    return "\n".join(lines)


def _folded(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 78, initial_indent="  - ", subsequent_indent="    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose id holds this")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON document to a file")
    args = parser.parse_args()
    rows = [*published(args.only), *calibrated(args.only), *virtual(args.only)]
    groups = summary(rows)
    document = {
        "benchmark": "validation", "summary": groups, "rows": [dataclasses.asdict(each) for each in rows],
        "machine": describe(),
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text if args.json else table(rows, groups))


if __name__ == "__main__":
    main()
