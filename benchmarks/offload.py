"""Models of which most waits on disk, run on the CPU: Loadplan, Accelerate and all in memory, same files, one run.

    pip install accelerate && python benchmarks/offload.py --json [--cases llama-2gb,llama-8gb,mixtral] [--folder DIR]

and with a GPU, of which models may hold a part (see offload_cuda.py), by plans that are made here or elsewhere:

    python benchmarks/offload.py --make-plans PLANS --cap 24GB
    python benchmarks/offload.py --device cuda --plan PLANS --json

Each case is a checkpoint of random bfloat16 weights; one is on disk at a time, twice (Accelerate copies what waits on
disk into files of its own, and its loading contains that). Both may keep the same share of the weights in memory.

Phases: load, prefill and decode (one token a step); warm, with all files in the page cache, and cold, with none of them
in it before each load or step. The limit is the time in memory where warm, and where cold the time in which the disk
gives as many bytes as Loadplan's process read from it, past the page cache, measured right after it. Of loading it is
reading the bytes that stay, into new memory. Times are medians. The measured peak is what tensors hold that are not in
a mapped file, and operator outputs on top of it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors.torch import save_file

import dispatch
import planner
from machine import describe
from planner import execution, loading

PROMPT_TOKENS = 32
IN_MEMORY = 0.2  # of the weights
WARM_STEPS, COLD_STEPS, PREFILLS, LOADS = 6, 2, 2, 2
READERS, READ_BYTES = 4, 8 * 2**20
SHARD_BYTES = 2 * 10**9
HEADS = {"vocab_size": 32000, "num_key_value_heads": 8, "dtype": "bfloat16"}
CASES: dict[str, Callable[[], Any]] = {
    "llama-2gb": lambda: transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16, **HEADS
    ),
    "llama-8gb": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=18, num_attention_heads=32, **HEADS
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=2048, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, num_local_experts=8,
        num_experts_per_tok=2, **HEADS,
    ),
}  # fmt: skip


@dataclasses.dataclass
class Run:
    """One engine's times in seconds by phase, and its logits by phase."""

    times: dict[str, list[float]]
    outputs: dict[str, torch.Tensor]
    limits: dict[str, list[float]]
    peak_bytes: int | None = None
    disk_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names with commas between them; all if not said")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; the temporary folder if not said")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    cuda = parser.add_argument_group("with --device cuda, whose cases are llama-13b, qwen-32b and mixtral")
    cuda.add_argument("--plan", type=Path, help="a plan, or the folder that --make-plans wrote; made now if not said")
    cuda.add_argument("--make-plans", type=Path, help="write the plans to this folder, and run nothing: needs no GPU")
    cuda.add_argument("--batches", default="1,8,64")
    cuda.add_argument("--cap", help="GPU memory that plans may use; what leaves half of the weights out if not said")
    cuda.add_argument("--gpus", default="1xh200", help="the GPU that plans are made for; or local")
    cuda.add_argument("--ram", default="110GB", help="the host memory that plans are made for")
    cuda.add_argument("--pretend", action="store_true", help=argparse.SUPPRESS)  # the CPU plays the GPU
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    rows = []
    for row in on_cuda(options) if options.device == "cuda" or options.make_plans else on_cpu(options):
        rows.append(row)
        print(table_line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json and not options.make_plans:
        print(json.dumps({"benchmark": "offload", "rows": rows, "machine": describe()}, indent=1))


def cases_of(options: argparse.Namespace, known: Iterable[str]) -> list[str]:
    cases = options.cases.split(",") if options.cases else list(known)
    if set(cases) - set(known):
        raise SystemExit(f"no case {', '.join(sorted(set(cases) - set(known)))}; there are {', '.join(known)}")
    return cases


def on_cpu(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in cases_of(options, CASES):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            yield from rows_of(case, Path(name))


def on_cuda(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import offload_cuda  # not where the CPU is measured

    cases = cases_of(options, offload_cuda.CASES) if not options.pretend else options.cases.split(",")
    if options.make_plans is not None:
        offload_cuda.make_plans(options.make_plans, cases, options)
        return
    with tempfile.TemporaryDirectory() as name:
        if options.plan is None:
            offload_cuda.make_plans(Path(name), cases, options)
        yield from offload_cuda.rows(options.plan or Path(name), cases, options)


def table_line(row: dict[str, Any]) -> str:
    return "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())


# The three engines


def rows_of(case: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one case."""
    say(f"{case}: writing its checkpoint")
    config = CASES[case]()
    weight_bytes = write_checkpoint(config, folder / "model")
    size = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": WARM_STEPS + 1, "weight_dtype": "bfloat16"}
    whole = planner.plan_model(str(folder / "model"), gpus=0, use_cache=False, **size)
    cap = whole.prediction.peak_bytes["cpu"] - int(weight_bytes * (1 - IN_MEMORY))
    plan = planner.plan_model(str(folder / "model"), gpus=0, max_memory={"cpu": cap}, use_cache=False, **size)
    own = ours(folder, plan)
    gc.collect()
    other = theirs(folder, config, plan, int(weight_bytes * IN_MEMORY))
    gc.collect()
    plain = resident(folder, plan)
    gc.collect()
    for phase in own.times:
        same = [same_outputs(run, plain, phase) for run in (own, other)]
        of_plain = statistics.median(plain.times[phase.replace("cold", "warm")])
        limits = own.limits.get(phase)
        loads = phase.startswith("load")
        yield {
            "case": case,
            "phase": phase,
            "device": "cpu",
            "ours_s": statistics.median(own.times[phase]),
            "accelerate_s": statistics.median(other.times[phase]),
            "resident_s": of_plain,
            "limit_s": statistics.median(limits) if limits else of_plain,
            "outputs_equal": same[0],
            "accelerate_outputs_equal": same[1],
            "predicted_peak_bytes": (plan.prediction.load_peak_bytes if loads else plan.prediction.peak_bytes)["cpu"],
            "measured_peak_bytes": None if loads else own.peak_bytes,
            "weight_bytes": weight_bytes,
            "on_disk_bytes": own.disk_bytes,
            "accelerate_on_disk_bytes": other.disk_bytes,
        }


def same_outputs(run: Run, plain: Run, phase: str) -> bool | None:
    return torch.equal(run.outputs[phase], plain.outputs[phase]) if phase in plain.outputs else None


def ours(folder: Path, plan: planner.Plan) -> Run:
    def load() -> Any:
        return dispatch.apply(str(folder / "model"), plan, progress=False)

    run = Run({}, {}, {})
    say("loadplan")
    kept = loading.read_bytes(plan)
    model = None
    for phase in ("load cold", "load warm"):
        cold = phase.endswith("cold")
        run.times[phase], run.limits[phase] = [], []
        for _ in range(LOADS):
            model = None
            gc.collect()  # or two of them would be counted and timed
            forget(folder) if cold else remember(folder / "model")
            model, seconds = timed(load)
            run.times[phase].append(seconds)
            if cold:
                forget(folder)
            run.limits[phase].append(read_seconds(folder / "model", kept, direct=cold))
        say(f"{phase} {run.times[phase]} {run.limits[phase]}")
    run.disk_bytes = sum(p.nbytes for p in plan.placements if p.home == "disk")
    run.peak_bytes = held_bytes(folder) + operator_output_bytes(model)
    measure_phases(model, folder, run)
    return run


def theirs(folder: Path, config: Any, plan: planner.Plan, memory_bytes: int) -> Run:
    def load() -> Any:
        with accelerate.init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model.tie_weights()
        split = model._no_split_modules
        device_map = accelerate.infer_auto_device_map(
            model, max_memory={"cpu": memory_bytes}, no_split_module_classes=split
        )
        if plan.execution.experts is not None:
            model.set_experts_implementation(plan.execution.experts)
        return accelerate.load_checkpoint_and_dispatch(
            model, str(folder / "model"), device_map=device_map, offload_folder=str(folder / "offload"),
            no_split_module_classes=split, dtype=torch.bfloat16, force_hooks=True,
        )  # fmt: skip

    run = Run({}, {}, {})
    say("accelerate")
    for phase in ("load cold", "load warm"):
        shutil.rmtree(folder / "offload", ignore_errors=True)
        forget(folder) if phase == "load cold" else remember(folder)
        model, seconds = timed(load)
        run.times[phase] = [seconds]
    say(f"{run}")
    run.disk_bytes = sum(path.stat().st_size for path in (folder / "offload").glob("*.dat"))
    measure_phases(model, folder, run, warm_steps=3, cold_steps=1)
    shutil.rmtree(folder / "offload")
    return run


def resident(folder: Path, plan: planner.Plan) -> Run:
    run = Run({}, {}, {})
    say("in memory")
    remember(folder)
    mapped, seconds = timed(lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "model"))
    run.times["load warm"] = [seconds]
    if plan.execution.experts is not None:
        execution.register()
        mapped.set_experts_implementation(plan.execution.experts)
    # from_pretrained leaves weights in the mapped files: in memory means memory.
    for module in mapped.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
    measure_phases(mapped.eval(), folder, run, cold_steps=0)
    # What is computed is the same, whether or not files were in the page cache.
    run.outputs |= {phase.replace("warm", "cold"): logits for phase, logits in run.outputs.items()}
    return run


def measure_phases(
    model: Any, folder: Path, run: Run, *, warm_steps: int = WARM_STEPS, cold_steps: int = COLD_STEPS
) -> None:
    """Measure prefill and decode, warm and then cold; outputs are those of the first prefill and step."""
    tokens = torch.arange(PROMPT_TOKENS)[None] + 5

    @torch.no_grad()
    def prefill() -> Any:
        return model(tokens, use_cache=True)

    @torch.no_grad()
    def step(cache: Any) -> Any:
        return model(tokens[:, :1], past_key_values=cache)

    def measure(phase: str, call: Callable[[], Any], count: int) -> Any:
        run.times[phase], cold = [], phase.endswith("cold")
        for number in range(count):
            if cold:
                forget(folder)
            before = storage_read_bytes()
            out, seconds = timed(call)
            came = storage_read_bytes() - before
            run.times[phase].append(seconds)
            if number == 0:
                run.outputs[phase] = out.logits
            if cold:
                forget(folder)
                run.limits.setdefault(phase, []).append(read_seconds(folder / "model", came, direct=True))
        say(f"{phase} {run.times[phase]} {run.limits.get(phase, [])}")
        return out

    remember(folder)
    cache = prefill().past_key_values  # the first call of a process takes longer
    step(cache)
    cache = measure("prefill warm", prefill, PREFILLS).past_key_values
    measure("decode warm", lambda: step(cache), warm_steps)
    if cold_steps:
        colder = measure("prefill cold", prefill, 1).past_key_values
        measure("decode cold", lambda: step(colder), cold_steps)


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


# Files, the page cache and memory


def write_checkpoint(config: Any, folder: Path) -> int:
    """Write random weights under the model's own names, all experts of a layer in one tensor, as Accelerate needs them;
    return their bytes.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    shard, total, count, index = {}, 0, 0, {}
    for number, (name, like) in enumerate(model.state_dict().items()):
        shape = like.shape
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            # Other weights for every tensor, at the speed of memory: the pool from another start on.
            length = math.prod(shape)
            turned = pool.roll(-(number * 7919 % len(pool)))
            tensor = turned.repeat(-(-length // len(turned)))[:length].view(shape).contiguous()
        shard[name] = tensor
        index[name] = f"model-{count:05}.safetensors"
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            save_file(shard, folder / index[name], metadata={"format": "pt"})
            shard, count = {}, count + 1
    if shard:
        save_file(shard, folder / f"model-{count:05}.safetensors", metadata={"format": "pt"})
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    config.save_pretrained(folder)
    return total


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".dat")]


def forget(folder: Path) -> None:
    """Take all files below a folder out of the page cache, and out of this process's mappings, or fail."""
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    gc.collect()
    for start, stop in mappings(folder):
        library.madvise(start, stop - start, mmap.MADV_DONTNEED)
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached_bytes(descriptor, path.stat().st_size)
        os.close(descriptor)
        if left > path.stat().st_size // 100:
            raise SystemExit(f"{path}: {left:,} bytes stay in the page cache")


def remember(folder: Path) -> None:
    """Bring all files below a folder into the page cache."""
    for path in files_of(folder):
        memory = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def mappings(folder: Path) -> list[tuple[int, int]]:
    """Return (start, end) addresses of this process's mappings of files below a folder."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(str(folder.resolve())):
            start, stop = fields[0].split("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def cached_bytes(descriptor: int, nbytes: int) -> int:
    """Return how much of a file is in the page cache."""
    library = ctypes.CDLL(None)
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    flags = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    with mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        library.mincore(ctypes.addressof(view), nbytes, flags)
        del view
    return flags.raw.count(b"\1") * mmap.PAGESIZE


def storage_read_bytes() -> int:
    """Return what this process has had read from storage."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def read_seconds(folder: Path, nbytes: int, *, direct: bool) -> float:
    """Return the time of reading so many bytes of a folder: past the page cache, or through it to new memory."""
    work, left = [], nbytes
    for path in files_of(folder):
        for offset in range(0, path.stat().st_size, READ_BYTES):
            if left > 0:
                work.append((path, offset, min(READ_BYTES, left)))
                left -= READ_BYTES
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    descriptors = {path: os.open(path, flags) for path in files_of(folder)}
    place = None if direct else torch.empty(nbytes, dtype=torch.uint8).numpy().data
    started = time.perf_counter()

    def read(reader: int) -> None:
        buffer = mmap.mmap(-1, READ_BYTES)
        for number in range(reader, len(work), READERS):
            path, offset, count = work[number]
            begin = number * READ_BYTES
            os.preadv(descriptors[path], [buffer if place is None else place[begin : begin + count]], offset)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    seconds = time.perf_counter() - started
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds


def held_bytes(folder: Path) -> int:
    """Return what all tensors of this process hold outside mapped files."""
    ranges, storages = mappings(folder), {}
    for thing in gc.get_objects():
        if (
            issubclass(type(thing), torch.Tensor)
            and thing.device.type == "cpu"
            and type(thing).__name__ != "FakeTensor"
        ):
            storage = thing.untyped_storage()
            address = storage.data_ptr()
            if address and not any(start <= address < stop for start, stop in ranges):
                storages[address] = storage.nbytes()
    return sum(storages.values())


def operator_output_bytes(model: Any) -> int:
    tokens, count = torch.arange(PROMPT_TOKENS)[None] + 5, WARM_STEPS + 1
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with dispatch.measure(model) as run:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return run.measurement.counters["cpu"]["operator_outputs"]


if __name__ == "__main__":
    main()
