"""The functions that Accelerate's users know, theirs and ours: the same model, map and files, one after the other.

    pip install accelerate && python benchmarks/familiar.py --json [--size 0.5GB] [--maps cpu,mixed,disk]

The model is a Llama shape of random bfloat16 weights whose checkpoint this script writes; it is read with the page
cache warm. A map has layers, embedding and head in host memory (cpu), every other layer on disk (mixed), or all of them
there (disk); the final norm is on --device, which runs what waits.

Of each function: seconds of a call, the median of several; what comes before it is not timed. A row without a map is of
a function that asks for none. Counted in one more call, for both sides alike:

- copied_bytes: what PyTorch's own operators copied (copy_, _to_copy, clone), by the bytes that were written.
- read_bytes, written_bytes: what went through the process's calls for reading and writing (rchar and wchar of
  /proc/self/io), whether or not a disk was needed. Pages of mapped files, and what is copied there, are in neither.
- file_bytes: of the files that are in the call's folder afterwards.
- peak_bytes: by how much the resident memory grew at most (VmHWM); pages of mapped files count there.

What is equal: logits, gradients, tensors, files and sizes, bit by bit. Maps and limits need not be: where things go is
decided anew here. `state_dict` is not where weights wait: Accelerate's has tensors on meta there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import statistics
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import hooks as their_hooks
from accelerate import utils as their_utils
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import dispatch
from machine import describe
from offload import remember, write_checkpoint
from planner.units import parse_bytes

WIDTH, VOCABULARY, TOKENS = 1024, 8000, 32
CALLS = 5
NAMES = (
    "init_empty_weights", "compute_module_sizes", "find_tied_parameters", "get_balanced_memory",
    "infer_auto_device_map", "load_checkpoint_in_model", "load_checkpoint_and_dispatch", "dispatch_model",
    "cpu_offload", "disk_offload", "cpu_offload_with_hook", "remove_hook_from_submodules",
)  # fmt: skip
COPIES = ("aten::copy_", "aten::_to_copy", "aten::clone")


def of_accelerate(name: str) -> Any:
    return next(getattr(each, name) for each in (accelerate, their_utils, their_hooks) if hasattr(each, name))


SIDES: dict[str, Any] = {
    "accelerate": types.SimpleNamespace(**{name: of_accelerate(name) for name in NAMES}),
    "ours": dispatch,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every call is given. folder: the checkpoint's; device: the one that runs."""

    config: Any
    folder: Path
    device: torch.device
    device_map: dict[str, Any]
    caps: dict[int | str, int]

    def empty(self) -> Any:
        """Return the model on meta, but for buffers that no checkpoint holds."""
        with accelerate.init_empty_weights():
            return transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()

    def loaded(self) -> Any:
        """Return the model in memory: from_pretrained alone would leave it in mapped files."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(torch.arange(TOKENS, device=self.device)[None] + 5).logits.cpu()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """One function: what is prepared for it, its call, and what is compared afterwards.

    side: who has the functions; scratch: an empty folder for each call. by_map: the map matters to it.
    """

    prepare: Callable[[Any, Task, Path], Any]
    call: Callable[[Any, Task, Any, Path], Any]
    outcome: Callable[[Task, Any, Path], Any]
    by_map: bool = True


def build_empty(side: Any, task: Task, model: Any, scratch: Path) -> Any:
    with side.init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(task.config, dtype=torch.bfloat16)


def loaded_and_run(side: Any, task: Task, model: Any, scratch: Path) -> Any:
    return side.load_checkpoint_and_dispatch(
        model, str(task.folder), device_map=dict(task.device_map), offload_folder=str(scratch), dtype=torch.bfloat16
    )


def loaded_in(side: Any, task: Task, model: Any, scratch: Path) -> Any:
    side.load_checkpoint_in_model(
        model, str(task.folder), device_map=dict(task.device_map), offload_folder=str(scratch), dtype=torch.bfloat16
    )
    return model


def called_and_sent_back(side: Any, task: Task, model: Any, scratch: Path) -> torch.Tensor:
    model, hook = side.cpu_offload_with_hook(model, task.device)
    logits = task.logits(model)
    hook.offload()
    return logits


def trained(side: Any, task: Task, model: Any, scratch: Path) -> torch.Tensor:
    """Return the gradients of embeddings, as those of an adapter before the first layer."""
    torch.manual_seed(0)
    shape = (1, TOKENS, task.config.hidden_size)
    rows = torch.randn(shape, dtype=torch.bfloat16, device=task.device, requires_grad=True)
    model(inputs_embeds=rows).logits.float().square().mean().backward()
    assert rows.grad is not None
    return rows.grad.cpu()


def frozen(side: Any, task: Task, scratch: Path) -> Any:
    return dispatched(side, task, scratch).requires_grad_(False)


def dispatched(side: Any, task: Task, scratch: Path) -> Any:
    return loaded_and_run(side, task, task.empty(), scratch)


def empty(side: Any, task: Task, scratch: Path) -> Any:
    return task.empty()


def loaded(side: Any, task: Task, scratch: Path) -> Any:
    return task.loaded()


def as_it_is(task: Task, found: Any, scratch: Path) -> Any:
    return found


def of_model(task: Task, model: Any, scratch: Path) -> Any:
    return task.logits(model)


def values(task: Task, model: Any, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of what the map does not have on disk."""
    return {
        name: tensor.detach().cpu()
        for name, tensor in model.named_parameters()
        if not any(home == "disk" and name.startswith(f"{key}.") for key, home in task.device_map.items())
    }


def saved_files(task: Task, found: Any, scratch: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in (scratch / "saved").glob("*.safetensors") for name, tensor in load_file(file).items()
    }


FUNCTIONS = {
    "init_empty_weights": Function(
        prepare=lambda side, task, scratch: None,
        call=build_empty,
        outcome=lambda task, model, scratch: [(name, p.is_meta, p.shape) for name, p in model.named_parameters()],
        by_map=False,
    ),
    "compute_module_sizes": Function(
        prepare=empty,
        call=lambda side, task, model, scratch: side.compute_module_sizes(model),
        outcome=lambda task, found, scratch: dict(found),
        by_map=False,
    ),
    "find_tied_parameters": Function(
        prepare=empty,
        call=lambda side, task, model, scratch: side.find_tied_parameters(model),
        outcome=as_it_is,
        by_map=False,
    ),
    "get_balanced_memory": Function(
        prepare=empty,
        call=lambda side, task, model, scratch: side.get_balanced_memory(
            model, dict(task.caps), no_split_module_classes=["LlamaDecoderLayer"]
        ),
        outcome=as_it_is,
        by_map=False,
    ),
    "infer_auto_device_map": Function(
        prepare=empty,
        call=lambda side, task, model, scratch: side.infer_auto_device_map(
            model, dict(task.caps), no_split_module_classes=["LlamaDecoderLayer"]
        ),
        outcome=lambda task, found, scratch: dict(found),
        by_map=False,
    ),
    "load_checkpoint_in_model": Function(prepare=empty, call=loaded_in, outcome=values),
    "load_checkpoint_and_dispatch": Function(prepare=empty, call=loaded_and_run, outcome=of_model),
    "dispatch_model": Function(
        prepare=loaded,
        call=lambda side, task, model, scratch: side.dispatch_model(
            model, dict(task.device_map), offload_dir=str(scratch)
        ),
        outcome=of_model,
    ),
    "cpu_offload": Function(
        prepare=loaded,
        call=lambda side, task, model, scratch: side.cpu_offload(model, task.device),
        outcome=of_model,
        by_map=False,
    ),
    "disk_offload": Function(
        prepare=loaded,
        call=lambda side, task, model, scratch: side.disk_offload(model, str(scratch), task.device),
        outcome=of_model,
        by_map=False,
    ),
    "cpu_offload_with_hook": Function(prepare=loaded, call=called_and_sent_back, outcome=as_it_is, by_map=False),
    "remove_hook_from_submodules": Function(
        prepare=dispatched,
        call=lambda side, task, model, scratch: side.remove_hook_from_submodules(model),
        outcome=as_it_is,
    ),
    "forward": Function(
        prepare=dispatched, call=lambda side, task, model, scratch: task.logits(model), outcome=as_it_is
    ),
    "training_step": Function(prepare=frozen, call=trained, outcome=as_it_is),
    "state_dict": Function(
        prepare=dispatched, call=lambda side, task, model, scratch: model.state_dict(), outcome=as_it_is
    ),
    "save_pretrained": Function(
        prepare=dispatched,
        call=lambda side, task, model, scratch: model.save_pretrained(scratch / "saved"),
        outcome=saved_files,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5GB", help="of the model's weights, about")
    parser.add_argument("--maps", default="cpu,mixed,disk")
    parser.add_argument("--functions", default=",".join(FUNCTIONS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; the temporary folder if not said")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    options = parser.parse_args()
    wanted = options.functions.split(",")
    unknown = {*wanted} - {*FUNCTIONS} | {*options.maps.split(",")} - {"cpu", "mixed", "disk"}
    if unknown:
        raise SystemExit(f"no {', '.join(sorted(unknown))}; there are {', '.join(FUNCTIONS)}, and cpu, mixed and disk")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
    logging.disable(logging.WARNING)
    their_utils.modeling.is_tqdm_available = lambda: False
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, config = Path(name), shape(parse_bytes(options.size))
        weight_bytes = write_checkpoint(config, folder / "model")
        remember(folder / "model")
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        caps: dict[int | str, int] = {0: weight_bytes // 2, 1: weight_bytes // 2, "cpu": weight_bytes}
        for function in wanted:
            homes = options.maps.split(",") if FUNCTIONS[function].by_map else [None]
            for home in homes:
                task = Task(
                    config=config, folder=folder / "model", device=device, caps=caps,
                    device_map=device_map(config, home or "cpu", device),
                )  # fmt: skip
                row = {"function": function, "map": home, "device": str(device), "weight_bytes": weight_bytes}
                row |= compared(FUNCTIONS[function], task, folder, options.calls)
                rows.append(row)
                print(table_line(row), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps({"benchmark": "familiar", "rows": rows, "machine": describe()}, indent=1))


def shape(nbytes: int) -> Any:
    """Return the config of a Llama shape of about so many bytes of bfloat16 weights, of two layers at least."""
    ends, layer = 2 * 2 * VOCABULARY * WIDTH, 2 * (4 + 3 * 4) * WIDTH * WIDTH
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=8,
        num_hidden_layers=max(2, round((nbytes - ends) / layer)), dtype="bfloat16",
    )  # fmt: skip


def device_map(config: Any, home: str, device: torch.device) -> dict[str, Any]:
    main = 0 if device.type == "cuda" else "cpu"
    homes = ["cpu", "disk"] if home == "mixed" else [home]
    places: dict[str, Any] = {
        f"model.layers.{index}": homes[index % len(homes)] for index in range(config.num_hidden_layers)
    }
    ends = dict.fromkeys(("model.embed_tokens", "lm_head"), homes[0])
    return {**places, **ends, "model.norm": main, "model.rotary_emb": main}


def table_line(row: dict[str, Any]) -> str:
    return "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())


# One function on both sides


def compared(function: Function, task: Task, folder: Path, calls: int) -> dict[str, Any]:
    """Return the row of a function: both sides' times, in turns, and what was counted of one more call each."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    found: dict[str, Any] = {}
    for _ in range(calls + 1):  # the first is for caches of code
        for name, side in SIDES.items():
            seconds[name].append(timed(function, side, task, folder))
    row: dict[str, Any] = {f"{name}_s": statistics.median(times[1:]) for name, times in seconds.items()}
    for name, side in SIDES.items():
        with prepared(function, side, task, folder) as (thing, scratch):
            with counted() as counts:
                result = function.call(side, task, thing, scratch)
            counts["file_bytes"] = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
            found[name] = function.outcome(task, result, scratch)
        thing = result = None
        row |= {f"{name}_{key}": count for key, count in counts.items()}
    ours, theirs = found["ours"], found["accelerate"]
    return row | {"outputs_equal": None if ours is None and theirs is None else same(ours, theirs)}


@contextlib.contextmanager
def prepared(function: Function, side: Any, task: Task, folder: Path) -> Iterator[tuple[Any, Path]]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield function.prepare(side, task, Path(name)), Path(name)


def timed(function: Function, side: Any, task: Task, folder: Path) -> float:
    with prepared(function, side, task, folder) as (thing, scratch):
        gc.collect()
        settle(task.device)
        started = time.perf_counter()
        result = function.call(side, task, thing, scratch)
        settle(task.device)
        seconds = time.perf_counter() - started
        del result
    return seconds


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.is_meta == other.is_meta
            and (one.is_meta or torch.equal(one.cpu(), other.cpu()))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


# What is counted


class Copies(TorchDispatchMode):
    """Counts the bytes that operators which copy have written."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in COPIES and not result.is_meta:
            self.nbytes += result.nbytes
        return result


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count what is copied, read and written, in threads that begin inside too, and how far resident memory grows."""
    counts: dict[str, int] = {}
    copies, run = [Copies()], threading.Thread.run

    def run_counted(thread: threading.Thread) -> None:
        copies.append(Copies())
        with copies[-1]:
            run(thread)

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, memory = fields("io"), fields("status")["VmRSS"]
    threading.Thread.run = run_counted  # type: ignore[method-assign]
    try:
        with copies[0]:
            yield counts
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
    after = fields("io")
    counts["copied_bytes"] = sum(each.nbytes for each in copies)
    counts["read_bytes"] = after["rchar"] - before["rchar"]
    counts["written_bytes"] = after["wchar"] - before["wchar"]
    counts["peak_bytes"] = max(0, fields("status")["VmHWM"] - memory)


def fields(name: str) -> dict[str, int]:
    """Return the numbers of a file of this process, those in kB as bytes."""
    found = {}
    for line in Path("/proc/self", name).read_text().splitlines():
        key, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdigit():
            found[key] = int(number) * (1024 if unit == "kB" else 1)
    return found


if __name__ == "__main__":
    main()
