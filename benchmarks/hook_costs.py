"""What Accelerate's hooks cost the host, copies apart: for a module, for a tensor in host memory, for one on disk.

python benchmarks/hook_costs.py [--json]

A row of small linear layers without a bias is called with and without hooks; the difference, shared among them, is the
cost of one. Weights wait in host memory, or as the files that `disk_offload` writes (page cache warm), and are brought
to the CPU: a tensor of 16 KiB takes next to nothing to copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import accelerate
import torch

from machine import describe
from simulate.accelerate_hooks import DISK_TENSOR_NS, HOST_TENSOR_NS, MODULE_NS

LAYERS, WIDTH, CALLS, ROUNDS = 64, 64, 20, 9


def row_of_layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).eval()


def call_ns(model: torch.nn.Module) -> float:
    """Return the median time of a call, in ns."""
    taken = []
    inputs = torch.zeros(1, WIDTH)
    with torch.no_grad():
        model(inputs)
        for _ in range(ROUNDS):
            started = time.perf_counter_ns()
            for _ in range(CALLS):
                model(inputs)
            taken.append((time.perf_counter_ns() - started) / CALLS)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = call_ns(row_of_layers())
    places = {str(number): "cpu" for number in range(LAYERS)}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, tuple[int, Callable[[], torch.nn.Module]]] = {
            "module": (MODULE_NS, lambda: accelerate.dispatch_model(row_of_layers(), places, force_hooks=True)),
            "tensor in host memory": (
                HOST_TENSOR_NS, lambda: accelerate.cpu_offload(row_of_layers(), torch.device("cpu"))
            ),
            "tensor on disk": (
                DISK_TENSOR_NS, lambda: accelerate.disk_offload(row_of_layers(), folder, torch.device("cpu"))
            ),
        }  # fmt: skip
        found = {name: (taken, round((call_ns(make()) - plain) / LAYERS)) for name, (taken, make) in ways.items()}
    rows = [{"what": name, "measured_ns": ns, "simulated_ns": taken} for name, (taken, ns) in found.items()]
    if args.json:
        print(json.dumps({"benchmark": "hook_costs", "rows": rows, "machine": describe()}, indent=1))
        return
    for each in rows:
        print(f"{each['what']:24}{each['measured_ns']:10,} ns  (simulated: {each['simulated_ns']:,} ns)")


if __name__ == "__main__":
    main()
