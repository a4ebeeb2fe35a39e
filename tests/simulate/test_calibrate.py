"""Calibration: figures from samples, what becomes of them, and what is predicted with them.

No test asserts how long anything takes: clocks are made up, and copies are fakes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import planner
from dispatch import page_cache, readahead
from planner import cost, rates
from planner.commands import options
from planner.commands.main import main
from planner.errors import InputError
from planner.graph import Layer, LayerGraph, LayerKind, Pass, Span, Tensor, WeightGroup
from planner.hardware import Device, Hardware, Link, MatmulRate
from planner.workload import Workload
from simulate.calibration import calibrate, decoder, disk, figures, gpu, machine, processor, together
from simulate.calibration.figures import Figure, Meter, mean_of, rate_of, time_of

RNG = random.Random(5)


class Clock:
    """A clock that stands still but for what is spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


# Figures


@pytest.mark.parametrize("count", [3, 4, 9, 10, 11, 40])
def test_the_mean_time_counts_and_nine_of_ten_lie_within_the_spread(count: int) -> None:
    samples = [RNG.uniform(1e6, 2e6) for _ in range(count)]
    figure = time_of("g", "n", samples)
    assert figure.value == round(sum(samples) / count)
    needed = math.ceil(0.9 * count)
    apart = [abs(s / figure.value - 1) for s in samples]
    assert sum(each <= figure.spread + 1e-4 for each in apart) >= needed
    assert sum(each < figure.spread - 1e-4 for each in apart) < needed
    assert (figure.samples, figure.unit) == (count, "ns")


def test_a_rate_is_of_the_mean_time() -> None:
    figure = rate_of("g", "n", "B/s", 100.0, [1.0, 1.0, 4.0])
    assert (figure.value, figure.samples, figure.spread) == (50, 3, 1.0)


def test_of_several_rounds_the_mean_time_counts_and_the_spread_holds_all() -> None:
    rounds = ([2.0, 2.0], [1.0, 1.0], [2.0, 4.0])
    rates = [rate_of("g", "n", "B/s", 10**6, times) for times in rounds]
    times = [time_of("g", "n", [each * 1e9 for each in times]) for times in rounds]
    for found, value in ((mean_of(rates), 5 * 10**5), (mean_of(times), 2 * 10**9)):
        assert found.value == pytest.approx(value, rel=1e-5)
        assert found.samples == 6
        # The slowest round's slowest: 4 seconds against 2.
        assert found.spread == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("taken", [1e-6, 3e-4, 0.02, 4.0])
def test_a_meter_gives_the_rate_however_long_a_call_is(taken: float) -> None:
    clock = Clock()
    meter = Meter(seconds=0.1, clock=clock)
    figure = meter.rate("g", "n", "FLOP/s", clock.spend(taken), 1e6)
    assert figure.value == pytest.approx(1e6 / taken, rel=1e-6)
    assert figure.spread < 1e-6
    assert figure.samples >= figures.LEAST_SAMPLES
    assert clock.now <= 0.1 + 10 * max(taken, 2 * figures.LEAST_SAMPLE_S)


def test_what_is_made_ready_is_not_timed_and_what_waits_is() -> None:
    clock, made = Clock(), []

    def ready() -> None:
        made.append(clock.now)
        clock.now += 7.0

    meter = Meter(seconds=0.1, clock=clock)
    samples = meter.samples(clock.spend(0.5), before=ready, after=clock.spend(0.25))
    assert samples == pytest.approx([0.75] * len(samples))
    assert len(made) == len(samples) + 1


# What is predicted with measured rates


def table(
    rate: Callable[[str, int, int], int], kinds: tuple[str, ...] = ("linear", "conv1d", "slice", "attention")
) -> Any:
    return tuple(
        MatmulRate(dtype="float32", rows=rows, flops_per_s=rate(kind, rows, width), kind=kind, width=width)  # type: ignore[arg-type]
        for kind in kinds
        for rows in (1, 16, 256)
        for width in (64, 4096)
    )


def cpu(matmuls: tuple[MatmulRate, ...], **more: Any) -> Device:
    known = {
        "name": "cpu", "kind": "cpu", "product": "a CPU", "pool": "cpu", "flops_per_s": {"default": 10**9},
        "bytes_per_s": 10**9, "operator_ns": 0, "context_bytes": 0, "workspace_bytes": 0, "matmuls": matmuls,
        "activation_bytes_per_s": 10**12,
    }  # fmt: skip
    return Device(**{**known, **more})


def span(flops: int, *, moved: int = 0, operators: int = 0, kv: int = 0) -> Span:
    return Span(
        count=1, held_bytes=0, peak_bytes=0, scratch_bytes=0, kv_before_bytes=0, kv_after_bytes=kv, input_bytes=0,
        flops=flops, moved_bytes=moved, operators=operators,
    )  # fmt: skip


def matrix(name: str, *shape: int) -> Tensor:
    return Tensor(name=name, shape=shape, dtype="float32", nbytes=4 * math.prod(shape))


def group(*tensors: Tensor, slices: int = 1, used: int = 1) -> WeightGroup:
    return WeightGroup(name="g", slices=slices, used_slices=used, streamable=True, tensors=tensors)


def test_rates_between_measured_ones_are_interpolated_in_logarithms() -> None:
    device = cpu(table(lambda kind, rows, width: 10**9 * rows * width))
    asked = [(1, 64), (16, 4096), (4, 64), (64, 512), (256, 64)]
    for rows, width in asked:
        found = rates.flops_per_s(device, "linear", dtype="float32", rows=rows, width=width)
        assert found == pytest.approx(1e9 * rows * width, rel=1e-9)
    ends = {(0.5, 1): (1, 64), (4096, 64): (256, 64), (16, 10**6): (16, 4096)}
    for (rows, width), (known, at) in ends.items():
        found = rates.flops_per_s(device, "linear", dtype="float32", rows=rows, width=width)
        assert found == pytest.approx(1e9 * known * at, rel=1e-9)
    assert rates.flops_per_s(device, "linear", dtype="float16", rows=1, width=64) == 10**9
    sliced = cpu(
        tuple(
            MatmulRate(dtype="float32", rows=1, flops_per_s=w * 10**5 // i, kind="slice", width=w, inputs=i)
            for w in (10**4, 10**5)
            for i in (100, 1000)
        )
    )
    for width, inputs in ((10**4, 1000), (10**5, 100), (31_623, 316), (20_000, 500)):
        found = rates.flops_per_s(sliced, "slice", dtype="float32", rows=1, width=width, inputs=inputs)
        assert found == pytest.approx(1e5 * width / inputs, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 16, 256])
def test_a_layer_on_a_cpu_takes_the_sum_of_its_parts(rows: int) -> None:
    speeds = {"linear": 3 * 10**9, "conv1d": 10**9, "slice": 10**8, "attention": 7 * 10**8}
    device = cpu(table(lambda kind, *_: speeds[kind]), operator_ns=1000, activation_bytes_per_s=5 * 10**8)
    kind = LayerKind(name="Block", groups=(group(matrix("q.weight", 64, 64), matrix("k.weight", 32, 64)),))
    weights, attention = 4 * 96 * 64, 12_345
    work = span(2 * rows * 96 * 64 + attention, moved=weights + 999_000 + 500, operators=10, kv=500)
    want = 2 * rows * 96 * 64 / 3e9 + attention / 7e8 + 999_000 / 5e8 + 10 * 1e-6
    assert cost.compute_ns(kind, work, device, tokens=rows, dtype="float32") == pytest.approx(want * 1e9, abs=2)


def test_a_layer_on_a_gpu_takes_its_work_or_its_launches() -> None:
    kind = LayerKind(name="Block", groups=(group(matrix("q.weight", 64, 64)),))
    many = cpu(table(lambda *_: 10**9), kind="cuda", name="cuda:0", operator_ns=10_000)
    work = span(2 * 64 * 64, moved=4 * 64 * 64, operators=10)
    assert cost.compute_ns(kind, work, many, tokens=1, dtype="float32") == 100_000
    few = dataclasses.replace(many, operator_ns=1)
    assert cost.compute_ns(kind, work, few, tokens=1, dtype="float32") == 2 * 64 * 64


def test_products_of_the_last_token_and_of_transposed_weights_have_their_own_rates() -> None:
    speeds = {"linear": 3 * 10**9, "conv1d": 10**9, "slice": 10**8, "attention": 7 * 10**8}
    device = cpu(table(lambda kind, *_: speeds[kind]))
    head = LayerKind(name="Linear", groups=(group(matrix("weight", 1000, 64)),))
    flops, moved = 2 * 64_000, 4 * 64_000
    whole = cost.compute_ns(head, span(flops, moved=moved), device, tokens=1, dtype="float32")
    last = cost.compute_ns(head, span(flops, moved=moved), device, tokens=9, dtype="float32")
    assert (whole, last) == (pytest.approx(flops / 3, abs=2), pytest.approx(flops * 10, abs=2))
    bias = Tensor(name="c.bias", shape=(96,), dtype="float32", nbytes=384)
    transposed = LayerKind(name="Block", groups=(group(matrix("c.weight", 64, 96), bias),))
    usual = LayerKind(name="Block", groups=(group(matrix("c.weight", 96, 64), bias),))
    work = span(2 * 64 * 96, moved=4 * 64 * 96 + 384)
    assert cost.compute_ns(transposed, work, device, tokens=1, dtype="float32") == pytest.approx(2 * 64 * 96, abs=2)
    assert cost.compute_ns(usual, work, device, tokens=1, dtype="float32") == pytest.approx(2 * 64 * 96 / 3, abs=2)
    table_alone = LayerKind(name="Embedding", groups=(group(matrix("weight", 1000, 64)),))
    assert cost.compute_ns(table_alone, span(0, moved=512), device, tokens=9, dtype="float32") == 0


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_experts_compute_at_the_rows_that_each_sees(tokens: int) -> None:
    device = cpu(table(lambda kind, rows, width: 10**9 * rows), operator_ns=1)
    stacked = group(matrix("gate_up", 8, 128, 64), matrix("down", 8, 64, 64), slices=8, used=2)
    kind = LayerKind(name="Block", groups=(stacked,))
    elements = (128 * 64 + 64 * 64) * 2
    distinct = sum(1 - (1 - 2 / 8) ** tokens for _ in range(8))
    each = max(1.0, tokens * 2 / distinct)
    want = 2 * tokens * elements / (1e9 * each) * 1e9 + 14
    found = cost.compute_ns(kind, span(2 * tokens * elements), device, tokens=tokens, dtype="float32")
    assert found == pytest.approx(want, rel=1e-6, abs=2)


# Hardware that says how sure it is


def calibrated(spread: float = 0.25) -> Hardware:
    """A machine of a CPU and a disk whose rates were measured."""
    plain = Hardware.from_options(0, ram="8GB")
    host = dataclasses.replace(
        plain.device("cpu"), matmuls=table(lambda kind, rows, width: 10**10 * rows), activation_bytes_per_s=10**10,
        spread=spread,
    )  # fmt: skip
    disk_link = dataclasses.replace(
        plain.link("disk", "cpu"), spread=spread, mapped_bytes_per_s=10**9, cached_bytes_per_s=77 * 10**9,
        cached_mapped_bytes_per_s=10**11,
    )  # fmt: skip
    return dataclasses.replace(plain, devices=(host,), links=(disk_link,))


def test_slower_and_faster_move_every_rate_by_its_spread() -> None:
    known = calibrated()
    for other, factor in ((known.slower(), 1 / 1.25), (known.faster(), 1.25)):
        before, after = known.device("cpu"), other.device("cpu")
        assert after.bytes_per_s == pytest.approx(before.bytes_per_s * factor)
        assert after.operator_ns == pytest.approx(before.operator_ns / factor, abs=1)
        assert after.activation_bytes_per_s == pytest.approx(before.activation_bytes_per_s * factor)
        for old, new in zip(before.matmuls, after.matmuls, strict=True):
            assert new == dataclasses.replace(old, flops_per_s=int(old.flops_per_s * factor))
        for name in ("", "mapped_", "cached_", "cached_mapped_"):
            old, new = (getattr(each.links[0], f"{name}bytes_per_s") for each in (known, other))
            assert new == pytest.approx(old * factor)
    plain = Hardware.from_options("2x24GB")
    assert plain.slower() == plain == plain.faster()
    assert not plain.is_spread
    assert known.is_spread


def test_a_calibrated_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    known = calibrated()
    known.save(tmp_path / "here.json")
    assert Hardware.load(tmp_path / "here.json") == known


@pytest.mark.parametrize(
    ("where", "key", "value", "word"),
    [
        ("devices", "spread", -0.1, "spread of cpu"),
        ("devices", "activation_bytes_per_s", -1, "activation_bytes_per_s"),
        ("matmuls", "rows", 0, "rows"),
        ("matmuls", "flops_per_s", 0, "flops_per_s"),
        ("matmuls", "width", 0, "width"),
        ("matmuls", "kind", "convolution", "must be one of"),
        ("links", "spread", -1, "spread of the link"),
        ("links", "cached_bytes_per_s", -1, "cached_bytes_per_s"),
    ],
)
def test_a_file_with_an_impossible_figure_is_refused(
    tmp_path: Path, where: str, key: str, value: Any, word: str
) -> None:
    path = tmp_path / "here.json"
    calibrated().save(path)
    data = json.loads(path.read_text())
    holder = data["devices"][0]["matmuls"][0] if where == "matmuls" else data[where][0]
    holder[key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=word):
        Hardware.load(path)


def test_with_page_cache_reads_at_the_cached_rate_and_says_so() -> None:
    known = calibrated()
    warm = known.with_page_cache()
    link = warm.link("disk", "cpu")
    assert (link.bytes_per_s, link.mapped_bytes_per_s, link.latency_ns) == (77 * 10**9, 10**11, 0)
    assert "page cache" in warm.assumptions[-1]
    assert warm.with_max_memory({"cpu": "1GB"}).link("disk", "cpu") == warm.link("disk", "cpu")
    with pytest.raises(InputError, match="plan calibrate"):
        Hardware.from_options(0).with_page_cache()


def test_the_cpu_maps_whole_groups_and_reads_single_experts() -> None:
    known = calibrated()
    whole, stacked = group(matrix("w", 512, 512)), group(matrix("w", 8, 128, 256), slices=8, used=8)
    rates_of = {"whole": (whole, 10**9), "expert": (stacked, known.link("disk", "cpu").bytes_per_s)}
    for each, rate in rates_of.values():
        (_, bucket), *_ = each.waiting(1)
        found = cost.slice_copy_ns(known, each, bucket, "disk", "cpu", "disk", tokens=1)
        assert found == known.link("disk", "cpu").latency_ns + each.slice_slab_bytes * 10**9 // rate
    plain = Hardware.from_options(0)
    (_, bucket), *_ = whole.waiting(1)
    found = cost.slice_copy_ns(plain, whole, bucket, "disk", "cpu", "disk", tokens=1)
    assert found == cost.copy_ns(plain, "disk", "cpu", "disk", whole.slice_slab_bytes)


def small_graph() -> LayerGraph:
    kind = LayerKind(name="Block", groups=(group(matrix("w.weight", 512, 512)),))
    moved = 4 * 512 * 512 + 4096

    def one(name: str, tokens: int, context: int) -> Pass:
        held = dataclasses.replace(span(2 * tokens * 512 * 512, moved=moved, operators=5), count=3)
        return Pass(name=name, tokens=tokens, context_tokens=context, spans=(held,))

    return LayerGraph(
        model="small", batch_size=1, kinds=(kind,), layers=tuple(Layer(name=f"l.{i}", kind=0) for i in range(3)),
        edges=(), ties=(), loose=(), allocator_bytes=0,
        passes=(one("prefill", 32, 32), one("decode_first", 1, 33), one("decode_last", 1, 36)),
    )  # fmt: skip


def test_predictions_have_a_range_where_rates_were_measured_with_a_spread() -> None:
    work = Workload(prompt_tokens=32, new_tokens=5)
    graph = small_graph()
    sure = planner.place(graph, calibrated(spread=0.0), work).prediction
    found = planner.place(graph, calibrated(spread=0.25), work).prediction
    assert sure is not None
    assert found is not None
    assert (sure.prefill_ns_range, sure.decode_ns_range) == ((), ())
    for middle, (low, high) in (
        (found.prefill_ns, found.prefill_ns_range),
        (found.decode_ns_per_token, found.decode_ns_range),
    ):
        assert low == pytest.approx(middle / 1.25, rel=1e-3)
        assert high == pytest.approx(middle * 1.25, rel=1e-3)
    assert "prefill_ns_range" not in json.loads(planner.place(graph, calibrated(0.0), work).to_json())["prediction"]


# Copies between GPUs


def corrupting(sent: torch.Tensor) -> torch.Tensor:
    got = sent.clone()
    got.view(torch.uint8)[-3] ^= 1
    return got


def test_a_copy_that_changes_one_bit_is_found_out() -> None:
    assert gpu.arrives(torch.clone, nbytes=4096)
    assert not gpu.arrives(corrupting, nbytes=4096)
    calls = iter([torch.clone, torch.clone, corrupting])
    assert not gpu.arrives(lambda sent: next(calls)(sent), nbytes=4096)
    stale: list[torch.Tensor] = []

    def late(sent: torch.Tensor) -> torch.Tensor:
        stale.append(sent.clone())
        return stale[max(0, len(stale) - 2)]

    assert not gpu.arrives(late, nbytes=4096)


def copied(rate: int) -> gpu.Copies:
    figure = Figure(group="g", name="n", value=rate, unit="B/s", spread=0.02, samples=3)
    return gpu.Copies((dataclasses.replace(figure, value=gpu.COPY_BYTES[0] * 10**5), figure))


def test_where_copies_corrupt_the_link_is_the_way_through_the_host_and_reported() -> None:
    known = Hardware.from_options("2x24GB", links="p2p")
    devices = [torch.device(device.name) for device in known.gpus]
    held = machine._Held(known)

    def measure(meter: Meter, source: torch.device, target: torch.device) -> tuple[gpu.Copies, bool]:
        return copied(40 * 10**9), source.index == 0

    machine._between(held, Meter(seconds=0.1), devices, measure)
    good, bad = held.hardware.link("cuda:0", "cuda:1"), held.hardware.link("cuda:1", "cuda:0")
    assert (good.bytes_per_s, good.latency_ns, good.spread) == (40 * 10**9, 10_000, 0.02)
    up, down = known.link("cuda:1", "cpu"), known.link("cpu", "cuda:0")
    one_gigabyte = 1 / up.bytes_per_s + 1 / down.bytes_per_s
    assert bad.bytes_per_s == pytest.approx(1 / one_gigabyte, rel=1e-6)
    assert bad.latency_ns == up.latency_ns + down.latency_ns
    [note] = held.notes
    assert "cuda:1 to cuda:0" in note
    assert "CORRUPT" in note


def test_copies_of_every_size_are_timed() -> None:
    clock, made = Clock(), []

    def new(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.zeros(8, dtype=torch.uint8)

    found = gpu.copies(Meter(seconds=0.01, clock=clock), "g", new, new, wait=clock.spend(0.001))
    assert made == [size for size in gpu.COPY_BYTES for _ in range(2)]
    assert len(found.by_size) == len(gpu.COPY_BYTES)
    assert found.rate is found.by_size[-1]


# Several at once


def test_what_both_reach_together_is_the_sum() -> None:
    works = [together.Work(name, torch.ones(64).sum, nbytes) for name, nbytes in (("a", 10.0), ("b", 20.0))]
    first, second, both = together.pair(Meter(seconds=0.01), *works)
    assert (first.group, both.group, both.name) == ("a + b", "a + b", "together")
    assert min(first.value, second.value) > 0
    ends = [min(each.value * (1 - each.spread) for each in (first, second)), (first.value + second.value) * 3]
    assert ends[0] < both.value < ends[1]


# The disk


def test_the_file_is_of_weights_and_gone_at_the_end(tmp_path: Path) -> None:
    with disk.File(tmp_path, 2 * disk.CHUNK_BYTES + 5) as file:
        assert file.path.stat().st_size == file.nbytes == 2 * disk.CHUNK_BYTES
        numbers = torch.frombuffer(bytearray(file.path.read_bytes()), dtype=torch.bfloat16)
        assert torch.isfinite(numbers).all()
        file.drop()
        with file.mapped() as pages:
            assert pages[:64] == file.path.read_bytes()[:64]
    assert list(tmp_path.iterdir()) == []


def test_pages_are_brought_as_dispatch_brings_them() -> None:
    mine = (disk.READERS, disk.PIECE_BYTES, disk.ANNOUNCED_BYTES)
    assert mine == (readahead._READERS, readahead._PIECE_BYTES, page_cache._ANNOUNCED_BYTES)
    assert page_cache._MADV_POPULATE_READ == disk._MADV_POPULATE_READ


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--folder"):
        disk.File(tmp_path / "none", disk.CHUNK_BYTES)


# All of it


def test_operators_and_their_bytes_are_counted() -> None:
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad(), decoder._Counted(layer) as counted:
        out = layer(torch.ones(2, 8).view(1, 2, 8))
        out.transpose(1, 2).add_(1)
    made = 2 * 8 * 4
    # ones; the product, which reads and makes as much (weights do not count); what is added in place is only read.
    assert counted.nbytes == made + 2 * made + made
    assert counted.operators == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_of_a_model_is_counted_as_the_trace_counts_it(dtype: str) -> None:
    counts = []
    for layers in (1, 2):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, dtype=dtype,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            cache = model(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values
            with decoder._Counted(model) as counted:
                model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        counts.append((counted.operators, counted.nbytes))
    plan = planner.plan_model(config, gpus=0, prompt_tokens=16, new_tokens=2, weight_dtype=dtype, use_cache=False)
    traced = plan.graph.decode_passes[0].per_layer()[2]
    weights = sum(group.nbytes for group in plan.graph.kind_of(2).groups)
    assert traced.operators == counts[1][0] - counts[0][0]
    assert traced.moved_bytes - weights == counts[1][1] - counts[0][1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything measured on sizes that take no time."""
    sizes: list[tuple[Any, str, Any]] = [
        (processor, "INPUTS", 32),
        (together, "INPUTS", 32),
        (machine, "_QUICK_SLICES", {"widths": (64,), "inputs": (32, 64)}),
        (processor, "_CONTEXT", 32),
        (processor, "_MOST_ROTATED_BYTES", 2**20),
        (machine, "_QUICK_WIDTHS", (32,)),
        (machine, "_QUICK_ROWS", (1, 8)),
        (machine, "QUICK_FILE_BYTES", 2 * disk.CHUNK_BYTES),
        (disk, "_MATRIX", (512, 512)),
        (decoder, "PROMPT_TOKENS", 16),
        (decoder, "STEPS", 2),
        (decoder, "LEAST_RUNS", 1),
        (figures, "LEAST_SAMPLE_S", 1e-4),
        (machine, "QUICK_SECONDS", 1e-4),
    ]
    for module, name, value in sizes:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(processor, "cache_bytes", lambda: 2**22)
    monkeypatch.setattr(together, "cache_bytes", lambda: 2**22)
    shape = {**decoder._SHAPE, "vocab_size": 64, "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(decoder, "_SHAPE", shape)


@pytest.mark.usefixtures("tiny")
def test_calibrating_fills_in_what_plans_take_and_the_command_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "here.json"
    assert main(["calibrate", "--quick", "--json", "--out", str(out), "--folder", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    hardware = Hardware.load(out)
    assert list(tmp_path.iterdir()) == [out]
    host = hardware.device("cpu")
    assert {(each.kind, each.dtype) for each in host.matmuls} == {
        (kind, dtype) for kind in ("linear", "conv1d", "slice", "attention") for dtype in ("float32", "bfloat16")
    }
    assert told["hardware"]["devices"][0]["matmuls"][0]["flops_per_s"] == host.matmuls[0].flops_per_s
    assert host.activation_bytes_per_s > 0
    assert hardware.is_spread
    assert hardware.with_page_cache().link("disk", "cpu").bytes_per_s > 0
    assert [shared.name for shared in hardware.shared] == ["cpu memory"]
    assert hardware.shared[0].users == ("cpu",)
    assert hardware.shared[0].bytes_per_s >= host.bytes_per_s
    notes = " ".join(hardware.assumptions)
    assert "threads" in notes
    assert "not measured" not in notes
    for rate in ("GB/s (assumed)", "from memory", "FLOP", "read at", "for an operator"):
        assert rate not in notes
    assert "disk: measured in" in notes
    plan = planner.place(small_graph(), hardware, Workload(prompt_tokens=32, new_tokens=5))
    assert plan.prediction is not None
    assert plan.prediction.prefill_ns_range[0] <= plan.prediction.prefill_ns <= plan.prediction.prefill_ns_range[1]


def test_the_table_is_no_wider_than_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure(group="linear, bfloat16", name="1024 x 2048 x 8192", value=123_456_000_000, unit="FLOP/s",
                    spread=0.0123, samples=9)  # fmt: skip
    others = (
        dataclasses.replace(figure, value=123_456_789),
        dataclasses.replace(figure, group="memory", name="read", unit="B/s"),
        dataclasses.replace(figure, group="operators", name="float32", unit="ns", value=12_345),
    )
    found = machine.Calibration(hardware=calibrated(), figures=(figure, *others))
    monkeypatch.setattr("simulate.calibration.calibrate", lambda **asked: found)
    assert main(["calibrate"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("123.5 GFLOP/s", "0.123 GFLOP/s", "123.46 GB/s", "1.2%"):
        assert word in text


@pytest.mark.parametrize("words", [["--seconds", "0"], ["--seconds", "x"], ["--folder", "/no/such/folder", "--quick"]])
def test_what_cannot_be_used_is_refused(words: list[str], capsys: pytest.CaptureFixture[str], request: Any) -> None:
    if "--folder" in words:
        request.getfixturevalue("tiny")
    assert main(["calibrate", *words]) == 2
    assert "plan: error:" in capsys.readouterr().err


def test_nothing_is_left_where_calibrating_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulate.calibration.machine._processor", fails)
    out = tmp_path / "here.json"
    assert main(["calibrate", "--out", str(out), "--folder", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        calibrate(folder=tmp_path, hardware=calibrated())


def test_a_memory_is_shared_by_its_cpu_and_the_links_to_gpus() -> None:
    links = machine._links_at(Hardware.from_options("2x24GB"), "cpu")
    assert set(links) == {"cpu→cuda:0", "cuda:0→cpu", "cpu→cuda:1", "cuda:1→cpu"}


def test_links_keep_what_was_not_measured() -> None:
    held = machine._Held(Hardware.from_options("24GB"))
    link = Link(source="disk", target="cpu", bytes_per_s=5, latency_ns=6)
    held.link(link)
    assert held.hardware.link("disk", "cpu") == link
    before = Hardware.from_options("24GB")
    assert [each for each in held.hardware.links if each != link] == [
        each for each in before.links if (each.source, each.target) != ("disk", "cpu")
    ]


def test_page_cache_is_asked_for_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "here.json"
    calibrated().save(path)
    parser = argparse.ArgumentParser()
    options.add_machine_options(parser)
    asked = parser.parse_args(["--hardware", str(path), "--page-cache"])
    assert options.hardware(asked) == Hardware.load(path).with_page_cache()
    assert main(["--model", "gpt2", "--page-cache"]) == 2
    assert "plan calibrate" in " ".join(capsys.readouterr().err.split())
