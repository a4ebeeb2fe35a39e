"""What the terminal and the report both say of a plan, in words."""

# ruff: noqa: RUF001, RUF002 - ranges are written with an en dash
from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from planner.memory import waiting_slices, with_groups
from planner.plan import Placement, Plan, Solver
from planner.units import format_bytes, format_ns

# A gap is said with two digits that matter, down to so many decimals of a percent.
_MOST_DECIMALS = 6
_CHOSEN_PROMPT, _CHOSEN_BATCH = ("max-context",), ("max-batch", "throughput")


def ranges(numbers: Sequence[int]) -> list[str]:
    """Return ascending numbers as texts, neighbours joined: [0, 1, 2, 5] → ["0–2", "5"]."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    runs = [numbers[start:end] for start, end in pairwise(breaks) if start < end]
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def device_list(names: Sequence[str]) -> str:
    """Return names of devices, neighbours by number joined: "cuda:0–7, cpu and disk", "node0–3/cuda:0–7"."""
    words = _folded(_folded(names, r"(.*:|node)(\d+)()", least=2), r"(.*?)(\d+)(/.*)", least=3)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def _folded(names: Sequence[str], pattern: str, *, least: int) -> list[str]:
    """Return the names, `least` or more joined that differ only in the pattern's second group, a number."""
    alike: dict[tuple[str, str], dict[int, int]] = {}
    words: list[tuple[int, str]] = []
    for position, name in enumerate(names):
        if match := re.fullmatch(pattern, name):
            alike.setdefault((match[1], match[3]), {})[int(match[2])] = position
        else:
            words.append((position, name))
    for (before, after), numbers in alike.items():
        for part in ranges(sorted(numbers)):
            first, _, last = part.partition("–")
            inside = range(int(first), int(last or first) + 1)
            parts = {int(first): part} if len(inside) >= least else {number: str(number) for number in inside}
            words += [(numbers[number], f"{before}{text}{after}") for number, text in parts.items()]
    return [word for _, word in sorted(words)]


def gap(solver: Solver) -> str:
    """Return how far the objective may be above the best, rounded up: "1.3%", "0.0048%"."""
    above, whole = solver.objective_ns - solver.bound_ns, solver.objective_ns
    if solver.objective_bytes is not None and solver.bound_bytes is not None:
        above, whole = solver.objective_bytes - solver.bound_bytes, solver.objective_bytes
    if above <= 0 or whole <= 0:
        return "0%"
    decimals = 1
    while decimals < _MOST_DECIMALS and above * 100 * 10**decimals < 10 * whole:
        decimals += 1
    return f"{-(-above * 100 * 10**decimals // whole) / 10**decimals:.{decimals}f}%"


def proof(plan: Plan) -> str:
    """Return in a sentence what is proven of a plan; its full stop is left out."""
    solver = plan.solver
    if solver is None:
        return "None: no solver was run for this plan, so nothing is proven of how good it is"
    in_bytes = solver.objective_bytes is not None
    what = "takes less memory" if in_bytes else "costs less under the cost model"
    if solver.status == "optimal":
        return f"Proven optimal: no placement that is considered {what}"
    what = "take less memory" if in_bytes else "cost less under the cost model"
    return f"Not proven: another placement may {what}, by at most {gap(solver)}"


def cut_short(solver: Solver) -> str | None:
    """Return what ended the search before its own limits did, as a sentence without a full stop."""
    if solver.cut_short == "no":
        return None
    end = "The time limit" if solver.cut_short == "time limit" else "An interrupt"
    return f"{end} ended the search: this is the best that was found until then"


def bound(plan: Plan) -> tuple[str, int, int] | None:
    """Return what the objective counts, its bound, and the simulator's figure for the same, both in ns.

    None where the objective is no time, or there is nothing to compare.
    """
    solver, seen = plan.solver, plan.prediction
    if solver is None or seen is None or solver.objective_bytes is not None or not solver.bound_ns:
        return None
    objective = plan.workload.objective
    if objective == "tpot" and seen.decode_ns_per_token:
        return "a decode step", solver.bound_ns, seen.decode_ns_per_token
    if objective in ("ttft", "tpot"):
        return "the prefill", solver.bound_ns, seen.prefill_ns
    return "the whole call", solver.bound_ns, seen.total_ns


def objective(plan: Plan) -> str:
    """Return the objective's value and its bound: "29.8 s, bound 29.8 s", or in bytes."""
    solver = plan.solver
    assert solver is not None
    if solver.objective_bytes is not None and solver.bound_bytes is not None:
        return f"{format_bytes(solver.objective_bytes)}, bound {format_bytes(solver.bound_bytes)}"
    return f"{format_ns(solver.objective_ns)}, bound {format_ns(solver.bound_ns)}"


def work(plan: Plan) -> str:
    """Return what the model is asked to do; what the search chose is called so."""
    asked = plan.workload
    batch = " (chosen)" if asked.objective in _CHOSEN_BATCH else ""
    prompt = " (chosen)" if asked.objective in _CHOSEN_PROMPT else ""
    made = f", {asked.new_tokens:,} new tokens" if asked.caller == "generate" else ", in one forward pass"
    return f"batch {asked.batch_size:,}{batch}, prompt {asked.prompt_tokens:,} tokens{prompt}{made}"


def home(placement: Placement) -> str:
    """Return where a group waits: "cpu (pinned)", "cuda:0", "disk"."""
    if placement.home == placement.run_on or placement.memory in ("device", "disk"):
        return placement.home
    return f"{placement.home} ({placement.memory})"


def cpu_experts(plan: Plan) -> str | None:
    """Return in which passes the CPU computes experts that wait in host memory; None where it never does."""
    limits = {
        placement.cpu_up_to_tokens
        for placement, group in with_groups(plan.graph, plan.placements)
        if placement.cpu_up_to_tokens and waiting_slices(placement, group) and placement.memory != "disk"
    }
    if not limits:
        return None
    least, most = min(limits), max(limits)
    upto = f"{most:,} token{'s' if most > 1 else ''}"
    upto = upto if least == most else f"{least:,} to {upto}, by layer,"
    hosts = "the CPU" if len(plan.hardware.hosts) == 1 else "their CPUs"
    text = f"Experts that wait in host memory are computed there by {hosts} in passes of up to {upto} over all rows"
    passes = [entry.tokens * plan.graph.batch_size for entry in plan.graph.passes]
    if passes and max(passes) <= least:
        return f"{text}, as every pass of this call is"
    prefill = [entry.tokens * plan.graph.batch_size for entry in plan.graph.prefill_passes]
    decode = [entry.tokens * plan.graph.batch_size for entry in plan.graph.decode_passes]
    if decode and max(decode) <= least and min(prefill) > most:
        return f"{text}, as decode steps are; in the longer prefill they are copied"
    return f"{text}, and copied in longer ones"


def precisions(plan: Plan) -> str | None:
    """Return which weights are stored in another precision than the model's; None where all have its own."""
    totals: dict[str, int] = {}
    for placement in plan.placements:
        if placement.dtype is not None:
            totals[placement.dtype] = totals.get(placement.dtype, 0) + placement.nbytes
    if not totals:
        return None
    said = " and ".join(f"{format_bytes(nbytes)} in {name}" for name, nbytes in sorted(totals.items()))
    return f"Weights are stored as {said}, the others in {plan.model.weight_dtype}. dispatch does not run these yet"


def over_nodes(plan: Plan) -> str | None:
    """Return what is to be known of a plan that runs in several nodes; None for one that does not."""
    nodes = {plan.hardware.node(placement.run_on) for placement in plan.placements}
    if len(nodes) < 2:
        return None
    return f"It runs in {len(nodes)} nodes; dispatch does not run such plans yet"


def load_peak_bytes(plan: Plan) -> int:
    """Return the most that loading takes of one host's memory, in bytes."""
    assert plan.prediction is not None
    return max((plan.prediction.load_peak_bytes.get(host.pool, 0) for host in plan.hardware.hosts), default=0)


def unused(plan: Plan) -> list[str]:
    """Return the memories of a machine of several nodes that hold nothing at the peak; of one node all are shown."""
    if plan.prediction is None or len(plan.hardware.nodes) == 1:
        return []
    return [pool.name for pool in plan.hardware.pools if not plan.prediction.peak_bytes.get(pool.name)]


def cpu_words(up_to_tokens: int) -> str:
    """Return what follows a place whose experts the CPU computes: ", computed there up to 4 tokens"."""
    return f", computed there up to {up_to_tokens:,} token{'s' if up_to_tokens > 1 else ''}" if up_to_tokens else ""
