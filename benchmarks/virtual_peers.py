"""Tiny models on tight virtual GPUs: Loadplan's plans beside Accelerate's `auto` maps, under the same caps.

    pip install accelerate && python benchmarks/virtual_peers.py [--json]

Both are told how many bytes each GPU has, and run `generate` on virtual devices that enforce just that: weights,
activations, cache and the caller's inputs count, contexts and allocators do not. Loadplan is told of the work as well,
which Accelerate does not ask for. Hosts are large; what does not fit on a GPU waits there. A run is fine, wrong (other
tokens than the plain model's), out of memory, wholly on the CPU, or refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402  what follows is found through the line above
from accelerate import dispatch_model, infer_auto_device_map  # noqa: E402
from accelerate.utils import get_balanced_memory, modeling  # noqa: E402
from tight_cases import CONFIGS, SETTINGS, Setting, generate, plain, prompt, reference, settings  # noqa: E402
from transformers.utils import logging  # noqa: E402

import dispatch  # noqa: E402
import simulate  # noqa: E402
from machine import describe  # noqa: E402
from planner.units import GB  # noqa: E402
from simulate.virtual_machine import Machine  # noqa: E402


def _class_of(value: Any, *rest: Any) -> Any:
    return torch.nn.Parameter if isinstance(value, torch.Tensor) else type(value, *rest)


# Accelerate makes parameters anew as instances of their class, which is Parameter on real devices alone.
modeling.type = _class_of

OUTCOMES = ("fine", "wrong", "out of memory", "on the CPU", "refused")


class _NoGpuError(Exception):
    """A tool put the whole model on the CPU."""


def loadplan(setting: Setting, box: Machine) -> tuple[torch.Tensor, str | None]:
    """Return the tokens, and the experts implementation that they were made with."""
    model = dispatch.apply(reference(setting.name, None), setting.plan, devices=box.devices)
    tokens, _ = generate(model, box.inputs(prompt(), setting.plan.run_on()[0]))
    return tokens, setting.plan.execution.experts


def accelerate(setting: Setting, box: Machine) -> tuple[torch.Tensor, str | None]:
    """Return the tokens of the model under the map that `device_map="auto"` makes, and no experts implementation."""
    model = reference(setting.name, None)
    whole = tuple(model._no_split_modules or ())
    memory: dict[int | str, int] = dict.fromkeys(range(setting.gpus), setting.room_bytes)
    memory["cpu"] = GB
    memory = get_balanced_memory(model, max_memory=memory, no_split_module_classes=whole)
    found = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    if set(found.values()) == {"cpu"}:
        raise _NoGpuError
    names = {index: str(device) for index, device in enumerate(box.devices.values())}
    placed = {module: names.get(where, where) for module, where in found.items()}
    model = dispatch_model(model, placed, main_device=names[0], force_hooks=True)
    return generate(model, prompt().to(names[0]))[0], None


TOOLS: dict[str, Callable[[Setting, Machine], tuple[torch.Tensor, str | None]]] = {
    "loadplan": loadplan, "accelerate": accelerate,
}  # fmt: skip


def outcome(setting: Setting, tool: str) -> dict[str, Any]:
    """Run one tool on one machine, and return what came of it."""
    row: dict[str, Any] = {"model": setting.name, "gpus": setting.gpus, "room_bytes": setting.room_bytes, "tool": tool}
    inputs = 2 * prompt().numel() * 8
    capacities = dict.fromkeys((f"cuda:{index}" for index in range(setting.gpus)), setting.room_bytes + inputs)
    with Machine(capacities) as box:
        try:
            tokens, experts = TOOLS[tool](setting, box)
        except torch.OutOfMemoryError as exc:
            return row | {"outcome": "out of memory", "says": str(exc)}
        except _NoGpuError:
            return row | {"outcome": "on the CPU"}
        except (RuntimeError, ValueError, NotImplementedError) as exc:
            return row | {"outcome": "refused", "says": f"{type(exc).__name__}: {exc}"[:300]}
        peaks = {name: box.peak_bytes(name) for name in box.devices}
    same = torch.equal(tokens, plain(setting.name, experts)[0])
    return row | {"outcome": "fine" if same else "wrong", "peak_bytes": peaks}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines that count the outcomes of each tool, by how many GPUs there were and how much they had."""
    lines = [f"{'GPUs':>4} {'room':>5}  {'tool':<10} " + " ".join(f"{name:>13}" for name in OUTCOMES)]
    groups = [(gpus, fraction, tool) for gpus, fraction in SETTINGS for tool in TOOLS]
    for gpus, fraction, tool in groups:
        found = [row for row in rows if (row["gpus"], row["fraction"], row["tool"]) == (gpus, fraction, tool)]
        lines.append(f"{gpus:>4} {fraction:>5.0%}  {tool:<10} " + counts(found))
    all_of = {tool: counts([row for row in rows if row["tool"] == tool]) for tool in TOOLS}
    return lines + [f"{'':>4} {'all':>5}  {tool:<10} {found}" for tool, found in all_of.items()]


def counts(rows: list[dict[str, Any]]) -> str:
    return " ".join(f"{sum(row['outcome'] == name for row in rows):>13}" for name in OUTCOMES)


def summary(rows: list[dict[str, Any]]) -> Mapping[str, Mapping[str, int]]:
    return {
        tool: {name: sum((row["tool"], row["outcome"]) == (tool, name) for row in rows) for name in OUTCOMES}
        for tool in TOOLS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    rows = []
    for name in options.models:
        for setting, (_, fraction) in zip(settings(name), SETTINGS, strict=True):
            rows += [outcome(setting, tool) | {"fraction": fraction} for tool in TOOLS]
        print(f"{name}: done", file=sys.stderr)
    if options.json:
        print(json.dumps({"machine": describe(), "summary": summary(rows), "rows": rows}, indent=1))
    else:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
