"""`plan gpus`: the GPU products that `--gpus` knows by name."""

from __future__ import annotations

import json
from collections.abc import Sequence

from planner.commands import options
from planner.hardware import BANDWIDTH_FRACTION, MATMUL_FRACTION, products
from planner.units import GB, GIB


def run(argv: Sequence[str]) -> int:
    """Print the known products with the facts that plans use."""
    parser = options.Parser(prog="plan gpus", description="List the GPU products that --gpus knows.")
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    known = products()
    if args.json:
        options.say_json(json.dumps(known["products"], indent=1))
        return 0
    assumed: dict[str, list[str]] = {}
    for size, key in known["assumed_for_gb"].items():
        assumed.setdefault(key, []).append(f"{size}GB")
    name_width = max(len(key) for key in known["products"])
    product_width = max(len(facts["name"]) for facts in known["products"].values())
    lines = [f"{'--gpus':{name_width}}  {'product':{product_width}}  usable GB  TFLOP/s   GB/s  taken for"]
    lines += [
        f"{key:{name_width}}  {facts['name']:{product_width}}  {facts['usable_gib'] * GIB / GB:9.2f}  "
        f"{facts['half_tflops']:7.0f}  {facts['memory_gb_per_s']:5.0f}  "
        f"{', '.join(assumed.get(key, ()))}".rstrip()
        for key, facts in known["products"].items()
    ]
    lines += [
        "",
        "TFLOP/s (dense, 16 bit) and GB/s of memory are those of the datasheets; plans",
        f"take {MATMUL_FRACTION:.0%} and {BANDWIDTH_FRACTION:.0%} of them.",
    ]
    options.say("\n".join(lines))
    return 0
