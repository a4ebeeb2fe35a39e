"""What is predicted against what this CPU really holds, for every architecture of tests/support/architectures.py.

Operator outputs, in every forward call and in every layer, must be equal to the byte; what the allocator is asked for
must be too, but for what `OFF` lists. What measures (tests/support/live_storages.py) imports nothing of the planner.

Sizes, lengths, batches and threads are drawn from a seed, which every test's name carries; LOADPLAN_SEED sets another.
By default every architecture runs in both types by every caller, with batches of 1 and of 3, and what would take long
is drawn: which caller's answer has all 8 decode steps and which of the late ones is traced, on how many threads and by
which caller the allocator is watched. LOADPLAN_FULL=1 runs the whole product.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import planner
from architectures import ARCHITECTURES, Architecture, text_inputs, user_call
from live_storages import LiveSpan, allocator_peak, live_passes
from planner import storages, template
from planner.errors import TraceError
from planner.execution import ROUTED_EXPERTS, register
from planner.kernels import cpu
from planner.trace import Tracing, cut, span_memory
from planner.workload import Workload

SEED = int(os.environ.get("LOADPLAN_SEED", "20261121"))
FULL = os.environ.get("LOADPLAN_FULL") == "1"
NEW_TOKENS = 9
FIRST = range(4)

Caller = Literal["forward", "loop", "generate"]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
SHORT = {FLOAT: "fp32", BRAIN: "bf16", HALF: "fp16"}
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@dataclass(frozen=True)
class Case:
    """One model, and one call of it. options: of `generate`; work: what they are called in a Workload."""

    name: str
    dtype: torch.dtype
    caller: Caller
    new_tokens: int = NEW_TOKENS
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    work: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        parts = [self.name, SHORT[self.dtype], self.caller, self.variant, f"seed {SEED}"]
        return ", ".join(part for part in parts if part)

    @property
    def architecture(self) -> Architecture:
        return BY_NAME[self.name]

    def drawn(self, what: str) -> random.Random:
        """Return a source of numbers for one purpose, the same whichever tests run."""
        return random.Random(f"{SEED} {what} {self.name} {SHORT[self.dtype]} {self.caller} {self.variant}")

    @property
    def batch(self) -> int:
        """1 or 3: an architecture's first case is drawn, and the others take turns."""
        first = random.Random(f"{SEED} batch {self.name}").randrange(2)
        turn = (FLOAT, BRAIN, HALF).index(self.dtype) + ("forward", "loop", "generate").index(self.caller)
        return (1, 3)[(first + turn) % 2]

    @property
    def prompt(self) -> int:
        return self.drawn("prompt").randrange(5, 20)

    def model(self) -> Any:
        return built(self.name, self.dtype)

    def inputs(self) -> dict[str, Any]:
        torch.manual_seed(self.drawn("inputs").randrange(2**32))
        inputs: dict[str, Any] = self.architecture.inputs(self.model(), self.batch, self.prompt)
        return inputs

    def workload(self) -> Workload:
        return Workload(
            caller="generate" if self.caller == "generate" else "forward",
            batch_size=self.batch,
            prompt_tokens=self.prompt,
            new_tokens=1 if self.caller == "forward" else self.new_tokens,
            **self.work,
        )

    def call(self) -> Callable[[], Any]:
        call: Callable[[], Any] = user_call(self.model(), self.inputs(), self.caller, self.new_tokens, **self.options)
        return call

    def tracing(self, **how: Any) -> Tracing:
        architecture = self.architecture
        options = {"experts": architecture.experts, "examples": self.inputs() if architecture.examples else None}
        return Tracing(self.model(), self.workload(), **{**options, **how})


@functools.cache
def built(name: str, dtype: torch.dtype) -> Any:
    architecture = BY_NAME[name]
    torch.manual_seed(SEED)
    model = architecture.build(dtype, random.Random(f"{SEED} sizes {name} {SHORT[dtype]}"))
    if architecture.experts is not None:
        register()
        model.set_experts_implementation(architecture.experts)
    return model


def callers(architecture: Architecture) -> tuple[Caller, ...]:
    return ("forward", "loop", "generate") if architecture.generates else ("forward",)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Trace as `predict_memory` does, without the cyclic collector."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _settled() -> Iterator[None]:
    """Spare the cyclic collector what imports have made: real runs keep it, and would pass over it again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give with models as small as these."""
    with threads(1):
        yield


def predicted_spans(tracing: Tracing, number: int) -> list[LiveSpan]:
    """Return what one forward call is predicted to hold, layer by layer.

    A module that has several paths makes one span for each of them, the last path's first.
    """
    entry = tracing.step(number)
    first = {id(module): path for path, module in reversed(tracing.layers)}
    result: list[LiveSpan] = []
    before = -1
    for span, memory in zip(entry.spans, span_memory(entry), strict=True):
        layer = first[id(tracing.layers[span.layer][1])]
        held = memory.held_bytes + memory.cached_bytes
        made = (event for event in entry.events[span.start : span.end] if event.kind not in ("scratch", "library"))
        new = LiveSpan(layer, held, held + memory.peak_bytes, tuple(event.nbytes for event in made))
        if result and result[-1].layer == layer and span.layer < before:
            last = result.pop()
            new = LiveSpan(layer, last.held_bytes, max(last.most_bytes, new.most_bytes), last.events + new.events)
        result.append(new)
        before = span.layer
    return result


def late_steps(case: Case, count: int) -> list[int]:
    """Return the decode steps to compare that are traced one by one: all of them, or a drawn one."""
    late = range(len(FIRST), count)
    return list(late) if FULL or not late else [case.drawn("step").choice(late)]


def without_the_end(spans: list[LiveSpan], number: int, calls: int) -> list[LiveSpan]:
    """Return the spans of call `number` without events that are the caller's own way of ending, whatever they hold.

    After the last call these are the frees after which nothing is taken. A late step is traced after a longer prompt:
    what the caller does after it with tokens and masks is then cut otherwise, so that of it only the bytes count.
    """
    *others, last = spans
    events = list(last.events) if number in FIRST else []
    while number == calls - 1 and events and events[-1] < 0:
        events.pop()
    return [*others, replace(last, events=tuple(events))]


def differences(tracing: Tracing, real: list[list[LiveSpan]], steps: list[int]) -> list[str]:
    """Return where a prediction and a run differ, in words."""
    if tracing.inputs.steps != len(real):
        return [f"{tracing.inputs.steps} forward calls were expected, and {len(real)} made"]
    found = []
    real = [without_the_end(spans, number, len(real)) for number, spans in enumerate(real)]
    with uncollected():
        predicted = {number: predicted_spans(tracing, number) for number in steps}
    for number, spans in predicted.items():
        spans = without_the_end(spans, number, len(real))
        most, seen = (max(span.most_bytes for span in each) for each in (spans, real[number]))
        if most != seen:
            found.append(f"call {number}: predicted {most}, held {seen} ({most - seen:+})")
        if [span.layer for span in spans] != [span.layer for span in real[number]]:
            found.append(f"call {number}: other layers: {spans} {real[number]}")
            continue
        found += [
            f"call {number}: predicted {mine}\n       held {its}"
            for mine, its in zip(spans, real[number], strict=True)
            if mine != its
        ]
    return found


def check(case: Case, **how: Any) -> None:
    tracing = case.tracing(**how)
    real = live_passes(case.model(), [path for path, _ in tracing.layers], case.call())
    steps = [*FIRST[: len(real)], *late_steps(case, len(real))]
    found = differences(tracing, real, steps)
    assert not found, f"LOADPLAN_SEED={SEED} {case.workload()}\n" + "\n".join(found[:20])


# Operator outputs


def answered(name: str, dtype: torch.dtype, caller: Caller) -> int:
    """Return the tokens to make: of a loop and `generate`, one is short in fp32 and the other in bf16."""
    turn = random.Random(f"{SEED} long {name}").randrange(2) + (dtype is BRAIN) + (caller == "loop")
    return NEW_TOKENS if FULL or turn % 2 else 3


CASES = [
    Case(architecture.name, dtype, caller, answered(architecture.name, dtype, caller))
    for architecture in ARCHITECTURES
    for dtype in (FLOAT, BRAIN)
    for caller in callers(architecture)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_of_every_call_holds_what_is_predicted(case: Case) -> None:
    check(case)


def test_both_batches_are_drawn_for_each_architecture() -> None:
    assert len(ARCHITECTURES) >= 20
    for architecture in ARCHITECTURES:
        assert {case.batch for case in CASES if case.name == architecture.name} == {1, 3}


# Callers' options: (of `generate`, of a Workload).
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sample": ({"do_sample": True}, {"sampling": "sample"}),
    "top p": ({"do_sample": True, "top_p": 0.9}, {"sampling": "sample", "top_p": 0.9}),
    "beams": ({"num_beams": 3}, {"num_beams": 3}),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, {"num_beams": 2, "sampling": "sample"}),
    "beams returned": ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}),
    "samples returned": (
        {"do_sample": True, "num_return_sequences": 2},
        {"sampling": "sample", "num_return_sequences": 2},
    ),
    "static": ({"cache_implementation": "static"}, {"cache": "static"}),
    "static beams": ({"cache_implementation": "static", "num_beams": 2}, {"cache": "static", "num_beams": 2}),
    "fp8": ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, {"cache": "fp8"}),
}
VARIED = ("llama", "gemma3", "qwen3-moe", "t5", "mamba")


def varied() -> list[Case]:
    """Return every option with every architecture of `VARIED`, or with two that are drawn."""
    cases = []
    for variant, (options, work) in OPTIONS.items():
        names = VARIED if FULL else random.Random(f"{SEED} {variant}").sample(VARIED, 2)
        for name in names:
            dtype = random.Random(f"{SEED} {variant} {name}").choice((FLOAT, BRAIN))
            # transformers refuses these: a recurrent state is of neither kind, and two halves are not quantised.
            if (name, variant.split()[0]) not in {("mamba", "static"), ("mamba", "fp8"), ("t5", "fp8")}:
                cases.append(Case(name, dtype, "generate", 6, variant, options, work))
    return cases


@pytest.mark.parametrize("case", varied(), ids=str)
def test_options_of_generate_hold_what_is_predicted(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("name", [architecture.name for architecture in ARCHITECTURES])
def test_layers_played_for_each_other_hold_as_much_as_layers_run(name: str) -> None:
    """The same numbers, call by call and layer by layer, in the first calls."""
    caller = callers(BY_NAME[name])[-1]
    dtype = random.Random(f"{SEED} replay {name}").choice((FLOAT, BRAIN))
    case = Case(name, dtype, caller, new_tokens=NEW_TOKENS if FULL else 2)
    played, ran = case.tracing(), case.tracing(replay=False)
    with uncollected():
        for number in range(played.inputs.steps):
            assert predicted_spans(played, number) == predicted_spans(ran, number), f"{case} call {number}"


# Prompts in chunks


@dataclass(frozen=True)
class Chunked(Case):
    """A prompt of `length` tokens by `chunk`; of many chunks, those in the middle are not traced one by one."""

    sequences: int = 1
    length: int = 16
    chunk: int = 4

    @property
    def batch(self) -> int:
        return self.sequences

    @property
    def prompt(self) -> int:
        return self.length


def chunked(name: str, sequences: int, length: int, chunk: int, cache: str = "dynamic") -> Chunked:
    dtype = random.Random(f"{SEED} chunk {name} {chunk}").choice((FLOAT, BRAIN))
    options, work = OPTIONS[cache] if cache != "dynamic" else ({}, {})
    return Chunked(
        name, dtype, "generate", 6 if length == 17 else 3, f"chunks of {chunk} {cache}",
        {**options, "prefill_chunk_size": chunk}, {**work, "prefill_chunk": chunk}, sequences, length, chunk,
    )  # fmt: skip


# Chunks that divide the prompt, that do not, one that is longer than it, and so many that most are left out.
CUTS = ((16, 4), (17, 5), (9, 20), (21, 2))


CHUNKED = [
    (name, sequences, *cut)
    for row, name in enumerate(("llama", "mixtral"))
    for column, sequences in enumerate((1, 3))
    for turn, cut in enumerate(CUTS)
    if FULL or (row + column + turn // 2) % 2 == 0
]


@pytest.mark.parametrize(("name", "sequences", "length", "chunk"), CHUNKED)
def test_chunks_of_a_prompt_hold_what_is_predicted(name: str, sequences: int, length: int, chunk: int) -> None:
    check_chunks(chunked(name, sequences, length, chunk))


@pytest.mark.parametrize(("name", "cache"), [("gemma3", "dynamic"), ("llama", "static"), ("llama", "fp8")])
def test_chunks_in_other_caches_hold_what_is_predicted(name: str, cache: str) -> None:
    check_chunks(chunked(name, 3, 17, 5, cache))


def check_chunks(case: Chunked) -> None:
    """Hold every call that is traced against the real one, and the whole prediction against the real peaks."""
    tracing = case.tracing()
    chunks = tracing.inputs.chunks
    real = live_passes(case.model(), [path for path, _ in tracing.layers], case.call())
    assert len(real) == -(-case.length // case.chunk) + case.new_tokens - 1
    traced = [n for n in chunks.numbers() if n is not None]
    # What the call before the one that stands for many prepares for it is longer than in truth.
    ready = [n for n in traced if n + 1 in traced or n == chunks.count - 1]
    found = differences(tracing, real, [*ready, *range(chunks.count, len(real))])
    assert not found, f"LOADPLAN_SEED={SEED} {case.workload()}\n" + "\n".join(found[:20])
    predicted = planner.predict_memory(case.model(), case.workload(), device="cpu", experts=case.architecture.experts)
    most = [max(span.most_bytes for span in spans) for spans in real]
    said = [entry.operator_output_bytes for entry in (predicted.prefill, *predicted.decode)]
    assert said == [max(most[: chunks.count]), *most[chunks.count :]]


# Experts

MOE = tuple(architecture.name for architecture in ARCHITECTURES if architecture.experts is not None)


def with_experts(case: Case, experts: str) -> Any:
    model = copy.deepcopy(case.model())
    model.set_experts_implementation(experts)
    return model


def experts_of(model: Any) -> int:
    counts = [getattr(module, "num_experts", None) for module in model.modules()]
    return max(count for count in counts if isinstance(count, int))


def choose_the_same(model: Any) -> None:
    """Make every token like every expert as much, so that all go to the same ones."""
    for path, module in model.named_modules():
        if path.endswith((".gate", ".router")):
            for parameter in module.parameters(recurse=False):
                parameter.data.zero_()


@pytest.mark.parametrize("experts", [ROUTED_EXPERTS, "eager"])
@pytest.mark.parametrize("name", MOE)
def test_experts_one_by_one_hold_at_most_the_worst_routing(name: str, experts: str) -> None:
    dtype = random.Random(f"{SEED} {experts} {name}").choice((FLOAT, BRAIN))
    case = Case(name, dtype, "generate", new_tokens=3)
    model, tracing = with_experts(case, experts), case.tracing(experts=experts)
    layers = [path for path, _ in tracing.layers]
    steps = range(case.new_tokens)
    with uncollected():
        worst = [max(span.most_bytes for span in predicted_spans(tracing, number)) for number in steps]
    # "eager" lists the experts that were hit, 8 bytes for each: a routing almost as uneven may hit them all.
    slack = 8 * experts_of(model) if experts == "eager" else 0
    for _ in range(3):
        ids = text_inputs(model, case.batch, case.prompt)
        real = live_passes(model, layers, user_call(model, ids, "generate", case.new_tokens))
        held = [max(span.most_bytes for span in spans) for spans in real]
        assert all(one <= most + slack for one, most in zip(held, worst, strict=True)), (str(case), held, worst)
    choose_the_same(model)
    real = live_passes(model, layers, user_call(model, ids, "generate", case.new_tokens))
    assert not differences(tracing, real, list(steps)), str(case)


@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=SHORT.get)
@pytest.mark.parametrize("caller", ["forward", "generate"])
def test_grouped_products_of_types_that_torch_refuses_on_meta(dtype: torch.dtype, caller: Caller) -> None:
    """Rows are aligned to 16 bytes: widths of experts that do not fill them count as more."""
    for name in ("mixtral", "qwen3-moe"):
        check(Case(name, dtype, caller, new_tokens=2))


# Long answers


def sliding(dtype: torch.dtype, window: int) -> Any:
    config = MistralConfig(
        vocab_size=310, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_every_step_of_a_long_answer_is_predicted(name: str) -> None:
    """Steps between those traced are interpolated, on both sides of the step that fills the window."""
    draw = random.Random(f"{SEED} long {name}")
    dtype, batch, prompt, new_tokens = draw.choice((FLOAT, BRAIN)), draw.choice((1, 3)), draw.randrange(5, 12), 40
    window = prompt + draw.randrange(10, 30)
    model = built(name, dtype) if name == "llama" else sliding(dtype, window)
    work = Workload(batch_size=batch, prompt_tokens=prompt, new_tokens=new_tokens)
    call = user_call(model, text_inputs(model, batch, prompt), "generate", new_tokens)
    predicted = planner.predict_memory(model, work, device="cpu")
    entries = (predicted.prefill, *predicted.decode)
    real = [max(span.most_bytes for span in spans) for spans in live_passes(model, [""], call)]
    assert [entry.operator_output_bytes for entry in entries] == real, f"LOADPLAN_SEED={SEED} {work} window {window}"
    assert predicted.peak.operator_output_bytes == max(real)


# What the allocator is asked for

ALLOCATED = [
    Case(architecture.name, dtype, caller, new_tokens=NEW_TOKENS if FULL else 2)
    for architecture in ARCHITECTURES
    for dtype in (FLOAT, BRAIN)
    for caller in (
        callers(architecture)
        if FULL
        else (random.Random(f"{SEED} allocated {architecture.name} {dtype}").choice(callers(architecture)),)
    )
]


def counts(case: Case) -> tuple[int, ...]:
    """Return 1 and 2 threads, or one of them that is drawn: the other type of this architecture gets the other."""
    if FULL:
        return (1, 2)
    first = random.Random(f"{SEED} threads {case.name}").randrange(2)
    return (1 + (first + (case.dtype is FLOAT)) % 2,)


@dataclass(frozen=True)
class Off:
    """A known difference. most: how much more is predicted than was measured, as a part of it; never less."""

    reason: str
    most: float


ROUTED = "the scratch of 16-bit products goes by how many tokens each expert gets; predicted for the worst routing"
# What is not here is exact, in both types and on both numbers of threads.
OFF = {(name, BRAIN): Off(ROUTED, 0.25) for name in MOE}


def requested(case: Case, model: Any, count: int) -> tuple[int, int]:
    """Return what is predicted and what is measured, without weights."""
    architecture, inputs = case.architecture, case.inputs()
    predicted = planner.predict_memory(
        model, case.workload(), device="cpu", threads=count, experts=architecture.experts,
        example_inputs=inputs if architecture.examples else None,
    )  # fmt: skip
    measured = measured_peak(user_call(model, inputs, case.caller, case.new_tokens), count)
    return predicted.peak.requested_bytes - predicted.weight_bytes, measured


def measured_peak(call: Callable[[], Any], count: int) -> int:
    """Return the allocator's peak on so many threads, in a second call; libraries keep what the first takes."""
    with threads(count):
        with torch.no_grad():
            call()
        return allocator_peak(call)


@functools.cache
def is_modelled(name: str, dtype: torch.dtype) -> bool:
    """Tell whether this machine's kernels are those modelled, for this architecture: see kernels/cpu.py."""
    here = cpu.CpuKernels.local()
    if name in ("vit", "llava", "whisper", "mamba", "resnet", "unet") and not here.isa.startswith("AVX512"):
        return False
    return dtype is FLOAT or here.brgemm_bf16 or not here.onednn_bf16


@pytest.mark.parametrize(("case", "count"), [(case, count) for case in ALLOCATED for count in counts(case)], ids=str)
def test_what_is_asked_of_the_allocator_is_predicted(case: Case, count: int) -> None:
    if not is_modelled(case.name, case.dtype):
        pytest.skip("convolutions or 16-bit products on this CPU are among what kernels/cpu.py leaves out")
    off = OFF.get((case.name, case.dtype))
    where = f"LOADPLAN_SEED={SEED} {case} {case.workload()} on {count} threads"
    model = case.model()
    if off is not None:
        predicted, measured = requested(case, model, count)
        assert measured <= predicted <= measured * (1 + off.most), f"{where}: {predicted}, {measured}: {off.reason}"
        model = copy.deepcopy(model)
        choose_the_same(model)
    predicted, measured = requested(case, model, count)
    assert predicted == measured, f"{where}: {predicted - measured:+} ({predicted / measured - 1:+.2%})"


# The tests above can fail


def miss_a_free(patch: pytest.MonkeyPatch, number: int) -> None:
    freed, frees = storages.StorageTracer._freed, itertools.count()

    def missing(self: Any, key: int) -> None:
        before = len(self.events)
        freed(self, key)
        if len(self.events) > before and next(frees) == number:
            self.events.pop()

    patch.setattr(storages.StorageTracer, "_freed", missing)


def miss_an_operator(patch: pytest.MonkeyPatch, number: int) -> None:
    record, products = storages.StorageTracer._record, itertools.count()

    def blind(self: Any, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        is_product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        record(self, func, args, kwargs, [] if is_product and next(products) == number else outputs)

    patch.setattr(storages.StorageTracer, "_record", blind)


def forget_the_caller(patch: pytest.MonkeyPatch, number: int) -> None:
    def reach(self: Any, step: int) -> Any:
        longer = step - FIRST[-1]
        run = self._record(longer=longer, new_tokens=self.workload.new_tokens - longer, passes=len(FIRST))
        return cut(run, FIRST[-1], 1, self.workload.prompt_tokens + step)

    patch.setattr(Tracing, "_reach", reach)


def shorten_a_cache(patch: pytest.MonkeyPatch, number: int) -> None:
    set_state = template._set_state

    def wrong(layers: list[Any], index: int, kind: Any, state: dict[str, Any]) -> None:
        set_state(layers, index, kind, {**state, "keys": state["keys"][:, :, 1:]})

    patch.setattr(template, "_set_state", wrong)


FAULTS = {
    "llama": (miss_a_free, forget_the_caller, shorten_a_cache),
    "gemma3": (miss_an_operator, shorten_a_cache),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in FAULTS for fault in FAULTS[name]])
def test_a_tracer_with_a_fault_is_found_out(
    name: str, fault: Callable[[pytest.MonkeyPatch, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name, FLOAT, "generate", new_tokens=5)
    real = live_passes(case.model(), [path for path, _ in case.tracing().layers], case.call())
    assert not differences(case.tracing(), real, list(range(5)))
    fault(monkeypatch, case.drawn(fault.__name__).randrange(12))
    try:
        found = differences(case.tracing(), real, list(range(5)))
    except TraceError as exc:
        found = [str(exc)]
    assert found


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x * self.scale, x, x)


@pytest.mark.parametrize("count", [1, 2])
def test_a_kernel_whose_scratch_is_forgotten_is_found_out(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attention(), torch.randn(1, 2, 40, 16)

    def predicted() -> int:
        memory = planner.predict_memory(model, x, device="cpu", threads=count)
        return memory.peak.requested_bytes - memory.weight_bytes

    measured = measured_peak(lambda: model(x), count)
    assert predicted() == measured
    monkeypatch.delitem(cpu._RULES, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    assert predicted() < measured
