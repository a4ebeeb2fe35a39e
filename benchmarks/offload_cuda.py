"""Models of which a GPU may hold a part: Loadplan, Accelerate and all on the GPU, the same weights, one run. It is
called by `offload.py --device cuda`, and needs no ortools for plans that `offload.py --make-plans FOLDER` made.

Weights are random: each tensor is drawn on the GPU and put to its home, so that no checkpoint is read; loading is not
timed. Of host memory it takes what a plan lets wait there, pinned, or as much again for Accelerate: one at a time.

Times are those of `generate`: of its prefill, and the median of its decode steps. The limit is the time in which the
link, measured here with pinned memory, carries as many bytes as were copied. Predicted times are the plan's, and what
the simulator makes of the plan with that link in it. Peaks are device-used bytes: the allocator's greatest reserve,
and what of the GPU is taken beside it. The allocator is held to the cap, but where all is on the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers
from accelerate.utils import set_module_tensor_to_device

import dispatch
import planner
import simulate
from dispatch import place
from dispatch.buffers import Buffers
from dispatch.slots import SlotRing
from dispatch.stores import Store, host_slab
from dispatch.weights import Weights, recomputed_buffers
from planner import execution
from planner.errors import PlanError

PROMPT_TOKENS, NEW_TOKENS, FEWER_TOKENS = 128, 9, 3
RUNS = 2
LINK_BYTES, LINK_COPIES = 2**30, 8
POOL = 2**24
# Of a GPU, beside the weights, where all is on it: cache, activations and context.
SPARE_BYTES = 12 * 10**9
CASES: dict[str, Callable[[], Any]] = {
    "llama-13b": lambda: transformers.LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "qwen-32b": lambda: transformers.Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128,
    ),
    "mixtral": lambda: transformers.MixtralConfig(),
}  # fmt: skip
SMALL = {"vocab_size": 2000, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
# To try the flow, also with `--pretend`: not in a table of results.
TRIALS: dict[str, Callable[[], Any]] = {
    "small-llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=1408, num_hidden_layers=8),
    "small-mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=512, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2
    ),
}


@dataclasses.dataclass
class Run:
    """What one engine took: seconds and bytes copied by phase, its tokens and logits; or why it did not run."""

    times: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {"prefill": [], "decode": []})
    copied: dict[str, list[int]] = dataclasses.field(default_factory=lambda: {"prefill": [], "decode": []})
    tokens: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def make_plans(folder: Path, cases: Sequence[str], options: argparse.Namespace) -> None:
    """Write a plan for each case and batch; a cap that is not given leaves half of the weights outside."""
    folder.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = {"gpus": options.gpus, "ram": options.ram}
    if options.gpus == "local":
        machine = {"hardware": planner.Hardware.local()}
    for case in cases:
        for batch in map(int, options.batches.split(",")):
            asked: dict[str, Any] = {
                **machine, "weight_dtype": "bfloat16", "batch_size": batch, "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": NEW_TOKENS, "use_cache": False,
            }  # fmt: skip
            cap = options.cap
            if cap is None:
                whole = planner.plan_model(config_of(case), **asked)
                cap = whole.prediction.peak_bytes["cuda:0"] - whole.model.weight_bytes // 2
            plan = planner.plan_model(config_of(case), max_memory={"cuda:0": cap}, **asked)
            plan.save(folder / f"{case}-{batch}.json")
            say(f"{folder / f'{case}-{batch}.json'}: {plan.prediction.decode_ns_per_token / 1e9:.3f} s a token")


def rows(plans: Path, cases: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield two rows for each case and batch; `plans` is one plan, or a folder of them."""
    card = Card(pretended=options.pretend)
    link = card.link_bytes_per_s()
    say(f"pinned link {link / 1e9:.2f} GB/s")
    for case in cases:
        for batch in options.batches.split(","):
            path = plans / f"{case}-{batch}.json" if plans.is_dir() else plans
            yield from rows_of(case, planner.Plan.load(path), card, link)


def rows_of(case: str, plan: planner.Plan, card: Card, link: float) -> Iterator[dict[str, Any]]:
    runs = {}
    for engine in (ours, theirs, resident):
        say(f"{case}, batch {plan.workload.batch_size}: {engine.__name__}")
        runs[engine.__name__] = run = attempt(engine, case, plan, card)
        say(f"{run.times} {run.peak_bytes} {run.failure or ''}")
    own, other, plain = runs["ours"], runs["theirs"], runs["resident"]
    here = simulated_ns(plan, link)
    for phase, planned_ns in (("prefill", plan.prediction.prefill_ns), ("decode", plan.prediction.decode_ns_per_token)):
        copied = median(own.copied[phase])
        yield {
            "case": case,
            "phase": phase,
            "device": card.name,
            "batch": plan.workload.batch_size,
            "prompt_tokens": plan.workload.prompt_tokens,
            "ours_s": median(own.times[phase]),
            "accelerate_s": median(other.times[phase]),
            "resident_s": median(plain.times[phase]),
            "limit_s": copied / link if copied else None,
            "copied_bytes": copied,
            "link_bytes_per_s": link,
            "predicted_s": planned_ns / 1e9,
            "predicted_with_this_link_s": here[phase] / 1e9,
            "outputs_equal": same(own, plain),
            "accelerate_outputs_equal": same(other, plain),
            "ours_equal_accelerate": same(own, other),
            "predicted_peak_bytes": plan.prediction.peak_bytes["cuda:0"],
            "measured_peak_bytes": own.peak_bytes,
            "accelerate_peak_bytes": other.peak_bytes,
            "weight_bytes": plan.model.weight_bytes,
            "failures": {name: run.failure for name, run in runs.items() if run.failure is not None},
        }


def attempt(engine: Callable[..., Run], case: str, plan: planner.Plan, card: Card) -> Run:
    """Return what an engine took, and leave nothing of it in memory."""
    try:
        return engine(case, plan, card)
    except (torch.OutOfMemoryError, PlanError) as error:
        failure = f"{type(error).__name__}: {error}"
    finally:
        card.clear()
    return Run(failure=failure)


# The three engines


def ours(case: str, plan: planner.Plan, card: Card) -> Run:
    card.cap(plan.hardware.pool("cuda:0").usable_bytes)
    drawn = Drawn(card.device)
    with mock.patch("dispatch.attach.Weights", taken_from(drawn)):
        model = dispatch.apply(on_meta(case), plan, devices={"cuda:0": card.device}, progress=False)
    drawn.forget()
    card.clear()
    with counted_copies() as copied:
        return measure(model, plan, card, copied, new_tokens=NEW_TOKENS, runs=RUNS)


def theirs(case: str, plan: planner.Plan, card: Card) -> Run:
    """Accelerate with a device map of its own making, for the memory of the GPU that the plan has for weights."""
    card.cap(plan.hardware.pool("cuda:0").usable_bytes)
    model = like_the_plan(on_meta(case), plan)
    kinds = plan.prediction.peak_breakdown["cuda:0"]
    limits = {0: kinds["weights"] + kinds["slots"], "cpu": plan.hardware.pool("cpu").usable_bytes}
    device_map = accelerate.infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=model._no_split_modules
    )

    def home(name: str) -> torch.device:
        inside = [path for path in device_map if not path or name == path or name.startswith(path + ".")]
        return torch.device("cpu") if device_map[max(inside, key=len)] == "cpu" else card.device

    fill(model, card, home)
    if card.device.type == "cpu":
        model = accelerate.cpu_offload(model, execution_device=card.device)
    else:
        model = accelerate.dispatch_model(model, device_map, main_device=0, force_hooks=True)
    card.clear()
    return measure(model, plan, card, [], new_tokens=FEWER_TOKENS, runs=1)


def resident(case: str, plan: planner.Plan, card: Card) -> Run:
    card.cap(None)
    if plan.model.weight_bytes + SPARE_BYTES > card.free_bytes():
        return Run(failure="does not fit")
    model = like_the_plan(on_meta(case), plan)
    fill(model, card, lambda name: card.device)
    card.clear()
    return measure(model, plan, card, [], new_tokens=NEW_TOKENS, runs=RUNS)


def measure(model: Any, plan: planner.Plan, card: Card, copied: list[int], *, new_tokens: int, runs: int) -> Run:
    """Measure so many calls after a first one, which takes longer; what is compared is computed after that."""
    batch = plan.workload.batch_size
    tokens = torch.arange(batch * PROMPT_TOKENS, device=card.device).view(batch, PROMPT_TOKENS) % 1000 + 5

    def generate(count: int) -> torch.Tensor:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        result: torch.Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return result

    run, ends = Run(), list[int]()
    generate(2)
    handle = model.register_forward_hook(lambda *args: ends.append(sum(copied)))
    peaks = []
    for _ in range(runs):
        ends[:] = [sum(copied)]
        with dispatch.measure(model, memory=False, routing=False) as recording:
            run.tokens = generate(new_tokens).cpu()
        found = recording.measurement
        assert found.prefill is not None
        assert found.decode is not None
        run.times["prefill"].append(found.prefill.median_ns / 1e9)
        run.times["decode"].append(found.decode.median_ns / 1e9)
        moved = [after - before for before, after in itertools.pairwise(ends)]
        run.copied["prefill"].append(moved[0])
        run.copied["decode"] += moved[1:]
        peaks.append(found.counters.get("cuda:0", {}).get("device_used"))
    handle.remove()
    run.peak_bytes = max((peak for peak in peaks if peak is not None), default=None)
    with torch.no_grad():
        run.logits = model(tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=1).logits.cpu()
    return run


def same(one: Run, other: Run) -> bool | None:
    """Tell whether two engines computed the same bits and chose the same tokens, as far as both went."""
    if one.logits is None or other.logits is None or one.tokens is None or other.tokens is None:
        return None
    length = min(one.tokens.shape[1], other.tokens.shape[1])
    return torch.equal(one.logits, other.logits) and torch.equal(one.tokens[:, :length], other.tokens[:, :length])


def median(values: list[Any]) -> Any:
    return statistics.median(values) if values else None


def simulated_ns(plan: planner.Plan, link: float) -> dict[str, int]:
    """Return what the simulator makes of a plan whose GPU has this link to its host."""
    links = tuple(
        dataclasses.replace(each, bytes_per_s=int(link)) if (each.source, each.target) == ("cpu", "cuda:0") else each
        for each in plan.hardware.links
    )
    timeline = simulate.run(dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, links=links)))
    return {"prefill": timeline.prefill_ns, "decode": timeline.decode_ns_per_token}


# Weights


def config_of(case: str) -> Any:
    config = (CASES | TRIALS)[case]()
    config.dtype = torch.bfloat16
    config.eos_token_id = None
    return config


def on_meta(case: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_of(case), dtype=torch.bfloat16).eval()


def like_the_plan(model: Any, plan: planner.Plan) -> Any:
    """Return the model with the implementations that the plan names, so that outputs can be compared."""
    if plan.execution.attention is not None:
        model.set_attn_implementation(plan.execution.attention)
    if plan.execution.experts is not None:
        execution.register()
        model.set_experts_implementation(plan.execution.experts)
    return model


class Drawn:
    """Values for every tensor, by its name: a pool drawn on the GPU, read from another start for each."""

    def __init__(self, device: torch.device):
        drawn = torch.randn(POOL, generator=torch.Generator(device).manual_seed(0), device=device)
        self.pool = drawn.mul_(0.02).to(torch.bfloat16).repeat(2)

    def forget(self) -> None:
        """Give the pool's memory back: a model that was dispatched keeps what its weights came from."""
        self.pool = torch.empty(0)

    def into(self, name: str, place: torch.Tensor, *, scale: bool, begin: int = 0) -> None:
        """Fill a place with the values of a tensor from its element `begin` on; a scale, as of a norm, is ones."""
        if scale:
            place.fill_(1)
            return
        start = zlib.crc32(name.encode()) + begin
        flat = place.view(-1)
        for at in range(0, flat.numel(), POOL):
            count = min(POOL, flat.numel() - at)
            first = (start + at) % POOL
            flat[at : at + count].copy_(self.pool[first : first + count])


def taken_from(drawn: Drawn) -> type[Weights]:
    """Return what takes the place of the weights of a checkpoint in `dispatch.apply`."""

    class Random(Weights):
        def __init__(self, model: Any, checkpoint: None, **options: Any):
            self.model, self.checkpoint, self.offloaded, self.on_meta = model, None, False, True
            self.given, self.sources, self.computed = {}, {}, recomputed_buffers(model)
            self._owners, self.changed, self.lent = {}, False, False
            self.loaded, self._buffers = (lambda nbytes: None), Buffers(0, 0)

        def reading(self, *args: Any) -> Any:
            return contextlib.nullcontext()

        def _fill(self, name: str, view: torch.Tensor, expert: int | None) -> None:
            if name in self.computed:
                view.copy_(self.computed[name])
                return
            whole = place.get(*place.owner(self.model, name))
            drawn.into(name, view, scale=whole.dim() == 1, begin=(expert or 0) * view.numel())

    return Random


def fill(model: Any, card: Card, home: Callable[[str], torch.device]) -> None:
    """Give a model on meta the same values, each at its home."""
    drawn, computed = Drawn(card.device), recomputed_buffers(model)
    for name, like in list(place.named_tensors(model)):
        if name in computed:
            set_module_tensor_to_device(model, name, card.device, value=computed[name])
            continue
        tensor = torch.empty(like.shape, dtype=like.dtype, device=home(name))
        drawn.into(name, tensor, scale=like.dim() == 1)
        place.put(*place.owner(model, name), tensor)


# The card


@contextlib.contextmanager
def counted_copies() -> Iterator[list[int]]:
    """Give the bytes of every copy into a slot, of groups and of experts, from now on."""
    copied: list[int] = []
    copy = SlotRing.copy

    def counted(self: SlotRing, slot: int, store: Store) -> None:
        copied.append(store.layout.nbytes)
        copy(self, slot, store)

    with mock.patch.object(SlotRing, "copy", counted):
        yield copied


class Card:
    """The GPU, or the CPU that plays it to try the flow: then there are no peaks and no cap."""

    def __init__(self, *, pretended: bool):
        self.device = torch.device("cpu" if pretended else "cuda:0")
        self.name = "cpu, pretended" if pretended else torch.cuda.get_device_name(0)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cap(self, nbytes: int | None) -> None:
        """Hold the allocator to what so many bytes leave beside the context; None lets it have the whole card."""
        if self.device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(self.device)
            beside = whole - free - torch.cuda.memory_reserved(self.device)
            total = torch.cuda.get_device_properties(self.device).total_memory
            fraction = 1.0 if nbytes is None else min(1.0, (nbytes - beside) / total)
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 2 * SPARE_BYTES

    def link_bytes_per_s(self) -> float:
        """Return the rate of large copies from pinned host memory to the card, the median of several."""
        nbytes = LINK_BYTES if self.device.type == "cuda" else LINK_BYTES // 64
        source, target = host_slab(nbytes, self.device), torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(LINK_COPIES):
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - started)
        return nbytes / statistics.median(times)


def say(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)
