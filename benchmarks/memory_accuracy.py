"""Predicted memory beside measured, and beside what Accelerate says of the same model: weights, outputs, requests.

    pip install accelerate && python benchmarks/memory_accuracy.py [--device cpu|cuda|all] [--quick] [--json]

A row is one model, workload, device and counter. Every model has random weights; all its workloads run in one process
on the same weights. Counters on the CPU:

weights           bytes of the storages behind parameters and buffers.
operator_outputs  the most bytes alive in storages that operators made, followed by a dispatch mode.
requested         weights, and the most that the CPU's allocator held: torch's profiler, replayed. No mode is active.

On CUDA, where each case has a process of its own: `requested`, `allocated` and `reserved` are the peaks of torch's
caching allocator (`requested_bytes.all.peak`, `max_memory_allocated`, `max_memory_reserved`), and `device_used` is what
the whole device held more than before the process began, CUDA's context with it.

A prediction leaves out the inputs, which are the caller's; on the CPU they are made before counting starts, and on CUDA
what they take is measured and deducted (`input_bytes`), but for `reserved` and `device_used`, where it cannot be told.

error is (predicted - measured) / measured. `estimate_memory` is the total size that `accelerate estimate-memory` prints
for that width, `estimate_memory_20` the same with the 20 % that its documentation says inference may add ("up to"), and
`compute_module_sizes` the function of that name. The command builds its model by AutoModel, without the head; here it
is given the whole model, with ties. They say nothing of operators' outputs alone. A case that fails is a row with
`failure`, and the others go on.

Versions: written for torch 2.11 to 2.13, transformers 5.17 to 5.23 and accelerate 1.15; `machine` names those that ran.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402  what follows is found through the line above
import transformers  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from accelerate.commands import estimate  # noqa: E402
from accelerate.utils import compute_module_sizes  # noqa: E402

import planner  # noqa: E402
from architectures import ResNet, UNet  # noqa: E402
from kernel_scratch import events_of, peak_of  # noqa: E402
from live_storages import live_peak, weight_storage_bytes  # noqa: E402
from machine import describe  # noqa: E402
from planner.execution import GROUPED_EXPERTS, experts_modules, register  # noqa: E402

MIB = 2**20
FLOAT, HALF = torch.float32, torch.bfloat16
# In float32, which computes slowest here, longer prompts than these are left out.
MOST_FLOAT_TOKENS = 256
# A child that measures on a GPU builds its model, runs it and predicts.
CHILD_SECONDS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """build: of a dtype, on the current device. image: pixels a side, of what takes pictures."""

    name: str
    build: Callable[[torch.dtype], Any]
    works: tuple[planner.Workload, ...]
    dtypes: tuple[torch.dtype, ...] = (FLOAT, HALF)
    image: int | None = None
    image_name: str = "x"

    def works_in(self, dtype: torch.dtype) -> tuple[planner.Workload, ...]:
        most = MOST_FLOAT_TOKENS if dtype is FLOAT else 2**20
        return tuple(work for work in self.works if work.batch_size * work.prompt_tokens <= most)


def prompts(batch: int, prompt: int, new: int, **options: Any) -> planner.Workload:
    return planner.Workload(batch_size=batch, prompt_tokens=prompt, new_tokens=new, **options)


def forward(batch: int, prompt: int = 1) -> planner.Workload:
    return prompts(batch, prompt, 1, caller="forward")


def named(work: planner.Workload, model: Model) -> str:
    """Return a workload's name: the caller's choice, then batch x prompt + new tokens, or batch x pixels."""
    if model.image is not None:
        return f"forward {work.batch_size}x{model.image}px"
    size = f"{work.batch_size}x{work.prompt_tokens}"
    if work.caller == "forward":
        return f"forward {size}"
    choice = f"top-p {work.top_p}" if work.top_p is not None else "greedy"
    choice = f"{work.num_beams} beams" if work.num_beams > 1 else choice
    return f"{choice} {size}+{work.new_tokens}"


def decoder(config: str, **shape: Any) -> Callable[[torch.dtype], Any]:
    """Return a builder. No token ends an answer, so that every run makes all its tokens."""
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

    def build(dtype: torch.dtype) -> Any:
        made = getattr(transformers, config)(**shape, **ends)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).eval()

    return build


def converted(make: Callable[[], Any]) -> Callable[[torch.dtype], Any]:
    return lambda dtype: make().to(dtype).eval()


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


ANSWERS = (
    prompts(1, 512, 8),
    prompts(4, 64, 12),
    prompts(2, 256, 4, sampling="sample", top_p=0.9),
    prompts(1, 64, 8, num_beams=4),
    forward(2, 128),
)
PICTURES = (forward(1), forward(4))
ON_CPU = (
    Model(
        name="llama 134M",
        build=decoder(
            "LlamaConfig", vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
            num_attention_heads=12, num_key_value_heads=4,
        ),
        works=ANSWERS,
    ),
    Model(
        name="mixtral 112M",
        build=decoder(
            "MixtralConfig", vocab_size=32000, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        ),
        works=ANSWERS,
    ),
    Model(
        name="gemma2 96M",
        build=decoder(
            "Gemma2Config", vocab_size=65536, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=4, head_dim=96, sliding_window=128, query_pre_attn_scalar=96,
        ),
        works=ANSWERS,
    ),
    Model(
        name="gemma3 87M",
        build=decoder(
            "Gemma3TextConfig", vocab_size=65536, hidden_size=640, intermediate_size=2048, num_hidden_layers=9,
            num_attention_heads=4, num_key_value_heads=1, head_dim=160, sliding_window=128, sliding_window_pattern=3,
        ),
        works=ANSWERS,
    ),
    Model(
        name="t5 77M",
        build=converted(t5),
        works=(prompts(1, 512, 8), prompts(4, 64, 8, num_beams=4), prompts(4, 64, 8, sampling="sample", top_p=0.9)),
    ),
    Model(
        name="bert 110M",
        build=converted(lambda: transformers.BertModel(transformers.BertConfig())),
        works=(forward(1, 512), forward(4, 64)),
    ),
    Model(
        name="vit 86M",
        build=converted(lambda: transformers.ViTForImageClassification(transformers.ViTConfig())),
        works=PICTURES, image=224, image_name="pixel_values",
    ),
    Model(name="resnet 11M", build=converted(lambda: ResNet(64, 7)), works=PICTURES, image=224),
    Model(name="u-net 1M", build=converted(lambda: UNet(64)), works=PICTURES, image=256),
)  # fmt: skip
REAL_SIZES = tuple(prompts(batch, prompt, 4) for prompt in (512, 8192) for batch in (1, 16))
ON_CUDA = (
    Model(
        name="llama-2-7b",
        build=decoder(
            "LlamaConfig", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=16384,
        ),
        works=REAL_SIZES, dtypes=(HALF,),
    ),
    Model(
        name="mixtral, 4 layers",
        build=decoder(
            "MixtralConfig", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=16384,
        ),
        works=REAL_SIZES, dtypes=(HALF,),
    ),
)  # fmt: skip


def of_layers(model: Model, layers: int) -> Model:
    """Return the same decoder with so many layers."""

    def build(dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            config = model.build(dtype).config
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return replace(model, name=f"{model.name.split(',')[0]}, {layers} layers", build=build)


def inputs_for(case: Model, built: Any, work: planner.Workload, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what the caller gives: ids and their mask, or pictures."""
    torch.manual_seed(1)
    if case.image is not None:
        return {case.image_name: torch.randn(work.batch_size, 3, case.image, case.image, dtype=dtype)}
    ids = torch.randint(3, built.config.get_text_config().vocab_size, (work.batch_size, work.prompt_tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def call_of(built: Any, work: planner.Workload, given: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Return the call that a user would make."""
    if work.caller == "generate":
        options: dict[str, Any] = {"do_sample": work.sampling == "sample", "num_beams": work.num_beams}
        if work.top_p is not None:
            options["top_p"] = work.top_p
        return lambda: built.generate(**given, **options, max_new_tokens=work.new_tokens)
    caches = hasattr(built, "can_generate") and built.can_generate()
    return lambda: built(**given, **({"use_cache": False} if caches else {}))


def with_experts(built: Any) -> Any:
    """Set the experts that `predict_memory` assumes, in models that have any."""
    if experts_modules(built):
        register()
        built.set_experts_implementation(GROUPED_EXPERTS)
    return built


# Peers


def peers_of(case: Model, dtype: torch.dtype) -> dict[str, int]:
    """Return what Accelerate says of a model's memory in `dtype`, in bytes."""

    def empty(dtype: torch.dtype) -> Any:
        with init_empty_weights():
            made = case.build(dtype)
        if hasattr(made, "tie_weights"):
            made.tie_weights()
        return made

    # It knows no bfloat16: its float16 is as wide.
    choice = "float32" if dtype is FLOAT else "float16"
    asked = argparse.Namespace(model_name=case.name, library_name=None, trust_remote_code=False, dtypes=[choice])
    with mock.patch.object(estimate, "create_empty_model", return_value=empty(FLOAT)):
        ((_, _, total, _),) = estimate.gather_data(asked)
    return {
        "estimate_memory": int(total),
        "estimate_memory_20": int(total) * 6 // 5,
        "compute_module_sizes": int(compute_module_sizes(empty(dtype))[""]),
    }


# Rows


def relative(predicted: int | None, measured: int | None) -> float | None:
    return None if predicted is None or not measured else round((predicted - measured) / measured, 9)


def rows_of(
    head: dict[str, Any],
    predicted: Mapping[str, int | None],
    measured: dict[str, int],
    peers: dict[str, int],
    **more: Any,
) -> list[dict[str, Any]]:
    """Return a row for every counter that was measured or predicted."""
    rows = []
    for counter in [*predicted, *(name for name in measured if name not in predicted)]:
        real = measured.get(counter)
        row = {
            **head,
            "counter": counter,
            "predicted_bytes": predicted.get(counter),
            "measured_bytes": real,
            "error": relative(predicted.get(counter), real),
            **more,
        }
        if counter != "operator_outputs":
            for name, said in peers.items():
                row |= {f"{name}_bytes": said, f"{name}_error": relative(said, real)}
        rows.append(row)
    return rows


def head_of(case: Model, work: planner.Workload | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "model": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "workload": None if work is None else named(work, case),
        "device": device,
    }


def failed(head: dict[str, Any], reason: object) -> dict[str, Any]:
    text = f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason)
    nothing = dict.fromkeys(("counter", "predicted_bytes", "measured_bytes", "error"))
    return {**head, **nothing, "failure": text.strip()[-600:]}


def tell(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


# On the CPU


def on_cpu(cases: tuple[Model, ...]) -> Iterator[dict[str, Any]]:
    for case in cases:
        for dtype in case.dtypes:
            try:
                torch.manual_seed(0)
                built = with_experts(case.build(dtype))
                peers = peers_of(case, dtype)
            except Exception as exc:
                yield failed(head_of(case, None, dtype, "cpu"), exc)
                continue
            for work in case.works_in(dtype):
                head = head_of(case, work, dtype, "cpu")
                tell(f"{head['model']} {head['dtype']} {head['workload']}")
                try:
                    yield from compared(case, built, work, dtype, head, peers)
                except Exception as exc:
                    yield failed(head, exc)


def compared(
    case: Model, built: Any, work: planner.Workload, dtype: torch.dtype, head: dict[str, Any], peers: dict[str, int]
) -> list[dict[str, Any]]:
    given = inputs_for(case, built, work, dtype)
    examples = given if case.image is not None else None
    started = time.perf_counter()
    prediction = planner.predict_memory(built, work, device="cpu", example_inputs=examples)
    predicted_at = time.perf_counter()
    call = call_of(built, work, given)
    weights = weight_storage_bytes(built)
    measured = {
        "weights": weights,
        "operator_outputs": live_peak(built, call),
        "requested": weights + peak_of(events_of(call, warm=False)),
    }
    predicted = {
        "weights": prediction.weight_bytes,
        "operator_outputs": prediction.peak.operator_output_bytes,
        "requested": prediction.peak.requested_bytes,
    }
    taken = {"predict_s": predicted_at - started, "measure_s": time.perf_counter() - predicted_at}
    more = {"unmodelled": list(prediction.unmodelled), **{name: round(value, 2) for name, value in taken.items()}}
    return rows_of(head, predicted, measured, peers, **more)


# On CUDA


def on_cuda(cases: tuple[Model, ...], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number, case in enumerate(cases):
        for at, work in enumerate(case.works):
            head = head_of(case, work, case.dtypes[0], "cuda")
            tell(f"{head['model']} {head['workload']}")
            try:
                found = from_child(["--child", f"{number}:{at}", *layers_option(options)])
            except Exception as exc:
                yield failed(head, exc)
                continue
            found["measured"]["device_used"] = found.pop("device_used")
            failures = found.pop("failures")
            more = {name: found[name] for name in ("input_bytes", "unmodelled", "kernels")}
            if found["predicted"] or found["complete"]:
                measured = {name: value for name, value in found["measured"].items() if found["complete"]}
                yield from rows_of(head, found["predicted"], measured, found["peers"], **more)
            for failure in failures:
                yield failed(head, failure)


def layers_option(options: argparse.Namespace) -> list[str]:
    quick = ["--quick"] if options.quick else []
    return quick + ([] if options.layers is None else ["--layers", str(options.layers)])


def from_child(arguments: list[str]) -> dict[str, Any]:
    """Return what a child process says, with what the device holds more while it still lives than before it began."""
    free_before = torch.cuda.mem_get_info()[0]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        timer = threading.Timer(CHILD_SECONDS, child.kill)
        timer.start()
        try:
            line = child.stdout.readline()
            used = free_before - torch.cuda.mem_get_info()[0]
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.wait()
        finally:
            timer.cancel()
            child.kill()
        if not line:
            errors.seek(0)
            raise RuntimeError(f"the process ended with {child.returncode}: {errors.read()[-500:]}")
    return {**json.loads(line), "device_used": used}


def child(case: Model, work: planner.Workload) -> None:
    """Measure one case on the GPU in this process, say it in a line, and wait until the device was looked at."""
    result: dict[str, Any] = {
        "complete": False, "measured": {}, "predicted": {}, "input_bytes": 0, "unmodelled": [], "kernels": "",
        "peers": {}, "failures": [],
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result |= measured_on_cuda(case, work)
        except Exception as exc:
            result["failures"].append(f"{type(exc).__name__}: {exc}")
        try:
            with held_apart():
                result["peers"] = peers_of(case, case.dtypes[0])
                result |= predicted_for_cuda(case, work)
        except Exception as exc:
            result["failures"].append(f"{type(exc).__name__}: {exc}")
    print(json.dumps(result), flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def held_apart() -> Iterator[None]:
    """Check that what runs inside takes nothing of the GPU: it would be counted as the model's."""
    before = torch.cuda.memory_stats().get("reserved_bytes.all.peak", 0)
    yield
    if torch.cuda.memory_stats().get("reserved_bytes.all.peak", 0) != before:
        raise RuntimeError("predicting took memory of the GPU")


def measured_on_cuda(case: Model, work: planner.Workload) -> dict[str, Any]:
    """Return the peaks of one call. Weights come first on the device, each an allocation of its own, and nothing else.

    They are random where they lie, buffers too: numbers change no size.
    """
    with torch.device("meta"):
        built = with_experts(case.build(case.dtypes[0]))
    built.to_empty(device="cuda")
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.02)
    for buffer in built.buffers():
        buffer.fill_(1)
    before = torch.cuda.memory_stats()
    given = {name: t.to("cuda") for name, t in inputs_for(case, built, work, case.dtypes[0]).items()}
    after = torch.cuda.memory_stats()
    inputs = {
        counter: after[f"{counter}_bytes.all.current"] - before.get(f"{counter}_bytes.all.current", 0)
        for counter in ("requested", "allocated")
    }
    call = call_of(built, work, given)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        call()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    measured = {
        "weights": weight_storage_bytes(built),
        "requested": stats["requested_bytes.all.peak"] - inputs["requested"],
        "allocated": torch.cuda.max_memory_allocated() - inputs["allocated"],
        "reserved": torch.cuda.max_memory_reserved(),
    }
    return {"measured": measured, "input_bytes": inputs["allocated"], "complete": True}


def predicted_for_cuda(case: Model, work: planner.Workload) -> dict[str, Any]:
    with torch.device("meta"):
        built = case.build(case.dtypes[0])
    product, kernels, told = this_gpu()
    with kernels:
        prediction = planner.predict_memory(built, work, device="cuda", gpu=product)
    predicted = {
        "weights": prediction.weight_bytes,
        "requested": prediction.peak.requested_bytes,
        "allocated": prediction.peak.allocated_bytes,
        "reserved": prediction.peak.reserved_bytes,
        "device_used": prediction.device_used_bytes,
    }
    return {"predicted": predicted, "unmodelled": list(prediction.unmodelled), "kernels": told}


def this_gpu() -> tuple[str | None, contextlib.AbstractContextManager[Any], str]:
    """Return this GPU's product, a context in which its kernels are predicted, and in words what they are.

    The product is that with the same capability and multiprocessors, and of those the nearest in memory. Where there
    is none the kernels are those of the GPU's own properties, and CUDA's context is an unknown GPU's.
    """
    from planner.hardware import products
    from planner.kernels.cuda import CudaKernels

    facts = torch.cuda.get_device_properties(0)
    kernels = CudaKernels(capability=(facts.major, facts.minor), multiprocessors=facts.multi_processor_count)
    table = products()["products"]
    alike = [key for key in table if CudaKernels.of_product(key) == kernels]
    if alike:
        nearest = min(alike, key=lambda key: abs(table[key]["usable_gib"] * 2**30 - facts.total_memory))
        return nearest, contextlib.nullcontext(), f"{nearest}, as {facts.name} has its multiprocessors"
    own = mock.patch.object(CudaKernels, "of_product", return_value=kernels)
    return None, own, f"by the properties of {facts.name}"


# What is said


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each device and counter, each source's greatest and mean absolute error over all rows."""
    sources = {"loadplan": "predicted_bytes", **{name: f"{name}_bytes" for name in PEERS}}
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        for source, field in sources.items():
            said, real = row.get(field), row["measured_bytes"]
            if said is not None and real:
                found.setdefault((row["device"], row["counter"], source), []).append(abs(said - real) / real)
    return [
        {
            "device": device, "counter": counter, "source": source, "rows": len(errors),
            "exact": sum(error == 0 for error in errors), "max_error": round(max(errors), 9),
            "mean_error": round(sum(errors) / len(errors), 9),
        }
        for (device, counter, source), errors in found.items()
    ]  # fmt: skip


PEERS = ("estimate_memory", "estimate_memory_20", "compute_module_sizes")


def percent(error: float | None, *, exact: bool = False) -> str:
    if error is None:
        return "-"
    return "exact" if exact else f"{100 * error:+.2f} %"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows for a person: one line a counter, at most 100 columns."""
    lines = [
        f"{'model, dtype':<26}{'workload':<21}{'counter':<12}{'MiB':>10} {'error':>10}{'estimate':>10}{'+20 %':>9}",
    ]
    last = None
    for row in rows:
        key = (row["model"], row["dtype"], row["workload"])
        label = f"{row['model']}, {row['dtype'].replace('float', 'f')}"
        start = f"{label:<26}{row['workload'] or '':<21}" if key != last else " " * 47
        last = key
        if "failure" in row:
            lines.append(f"{start}{'failed: ' + row['failure'].splitlines()[-1]}"[:100])
            continue
        counter = {"operator_outputs": "outputs"}.get(row["counter"], row["counter"])
        measured = "-" if row["measured_bytes"] is None else f"{row['measured_bytes'] / MIB:,.1f}"
        exact = row["predicted_bytes"] == row["measured_bytes"]
        lines.append(
            f"{start}{counter:<12}{measured:>10} {percent(row['error'], exact=exact):>10}"
            f"{percent(row.get('estimate_memory_error')):>10}{percent(row.get('estimate_memory_20_error')):>9}"
        )
    lines += ["", f"{'absolute error':<44}{'rows':>6}{'exact':>7}{'mean':>12}{'greatest':>12}"]
    for entry in summary_of(rows):
        name = f"{entry['device']} {entry['counter']}: {entry['source']}"
        mean, most = (f"{100 * entry[field]:.3f} %" for field in ("mean_error", "max_error"))
        lines.append(f"{name:<44}{entry['rows']:>6}{entry['exact']:>7}{mean:>12}{most:>12}")
    failures = sum("failure" in row for row in rows)
    return "\n".join([*lines, *([f"{failures} failed"] if failures else [])])


def gpu_of() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name, "capability": [facts.major, facts.minor], "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def machine_of() -> dict[str, Any]:
    """Return where this ran; a machine without git names no commit."""
    none = subprocess.CompletedProcess([], 127, stdout="")
    git = contextlib.nullcontext() if shutil.which("git") else mock.patch.object(subprocess, "run", return_value=none)
    with git:
        described = describe()
    isa = torch.backends.cpu.get_cpu_capability()
    return {**described, "isa": isa, "threads": torch.get_num_threads(), "gpu": gpu_of()}


def document_of(rows: list[dict[str, Any]], seconds: int) -> str:
    """Return the JSON document, with one line for each row of the two lists."""
    parts = {"benchmark": "memory_accuracy", "seconds": seconds, "summary": summary_of(rows), "rows": rows}
    texts = []
    for name, value in {**parts, "machine": machine_of()}.items():
        text = json.dumps(value, indent=1).replace("\n", "\n ")
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(entry)}" for entry in value) + "\n ]"
        texts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(texts) + "\n}"


def chosen(options: argparse.Namespace, cases: tuple[Model, ...]) -> tuple[Model, ...]:
    """Return the cases that the options leave: with --quick, two workloads of each model in one dtype."""
    if options.layers is not None and cases is ON_CUDA:
        cases = tuple(of_layers(case, options.layers) for case in cases)
    if options.quick:
        return tuple(replace(case, works=case.works[:2], dtypes=case.dtypes[-1:]) for case in cases)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all that are here")
    parser.add_argument("--layers", type=int, help="layers of the models on CUDA; default: 32 and 4")
    parser.add_argument("--quick", action="store_true", help="one dtype, and two workloads of each model")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.child:
        number, at = map(int, options.child.split(":"))
        case = chosen(options, ON_CUDA)[number]
        child(case, case.works[at])
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    if options.device in ("cpu", "all"):
        rows += on_cpu(chosen(options, ON_CPU))
    if options.device in ("cuda", "all") and torch.cuda.is_available():
        rows += on_cuda(chosen(options, ON_CUDA), options)
    if not options.json:
        print(table_of(rows))
        return
    print(document_of(rows, round(time.perf_counter() - started)))


if __name__ == "__main__":
    main()
