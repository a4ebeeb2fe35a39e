"""How good plans are and how fast they are found, beside the maps that others would make of the same model.

python benchmarks/placement.py [--json] [--quick] [--case NAME ...]

Each case runs in a process of its own, ortools and the planner imported and the model traced before the clock starts;
`wall_s` is one call of `placement.find`. `simulated_ns` and the peers' times are the simulator's for the whole call, on
the same graph and hardware and under the same memory limits (see peers.py). Experts run by route in every case, so that
maps which let some of them wait can be timed too. A case that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import peers
import random_graphs
import simulate
from machine import describe
from planner import verify_plan
from planner.errors import PlanError
from planner.given import dtype_of, source_of
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.placement.solution import find
from planner.rules import NO_RULES, Rules
from planner.tracer import Tracer
from planner.workload import Workload

# Tracing, solving and all peers; a case that takes longer is given up.
CASE_LIMIT_S = 200
MOST_GAP = 0.01
MOST_GAP_OF_GRAPHS = 0.02
MOST_DIFFERENCE = 0.02
GRAPH_NODES, GRAPH_GPUS = 200, 6
SMALL_GRAPH_NODES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question, and what its answer is held to. within_s: the time to find it in; most_gap: of the bound."""

    name: str
    task: Callable[[], peers.Task]
    rules: Rules = NO_RULES
    within_s: float | None = None
    most_gap: float | None = None
    quick: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of a case. peers: simulated ns by name, None where a peer has no map that fits; why: for those.

    broken: what `verify_plan` finds wrong with the plan.
    """

    case: str
    status: str | None = None
    gap: float | None = None
    wall_s: float | None = None
    objective_ns: int | None = None
    simulated_ns: int | None = None
    peers: dict[str, int | None]
    why: dict[str, str]
    broken: list[str]
    error: str | None = None


def model(
    name: str, gpus: str | int, *, batch: int = 1, prompt: int = 512, new: int = 128, **host: Any
) -> Callable[[], peers.Task]:
    """Return what makes the task of a model of the catalogue on a machine without nodes."""
    return lambda: traced(name, Hardware.from_options(gpus, **host), batch=batch, prompt=prompt, new=new)


def traced(name: str, hardware: Hardware, *, batch: int = 1, prompt: int = 512, new: int = 128) -> peers.Task:
    """Return the task of a model of the catalogue, its graph from the cache where it is kept there."""
    workload = Workload(batch_size=batch, prompt_tokens=prompt, new_tokens=new)
    source, module = source_of(name, hub=False, revision=None, trust_remote_code=False)
    tracer = Tracer(
        source, module, workload, dtype_of(None, source, module, None, []), False, use_cache=True,
        report=lambda text: None, hardware=hardware,
    )  # fmt: skip
    graph, _ = tracer.trace(routed=True)
    return peers.Task(graph=graph, hardware=hardware, workload=workload, model=tracer.built())


def eight_nodes() -> peers.Task:
    """Return Llama-3.1-405B on 64 GPUs of three kinds in 8 nodes."""
    nodes = ["8x80GB"] * 2 + ["8x48GB"] * 3 + ["8x24GB"] * 3
    return traced("meta-llama/Llama-3.1-405B", Hardware.from_options("/".join(nodes), ram="512GB"))


def graph_task(
    seed: int, nodes: int, family: Callable[[int, int], LayerGraph] = random_graphs.random_graph
) -> Callable[[], peers.Task]:
    def make() -> peers.Task:
        graph = family(seed, nodes)
        machine = random_graphs.random_machine(seed, graph, GRAPH_GPUS)
        return peers.Task(graph=graph, hardware=machine, workload=random_graphs.WORKLOAD)

    return make


LLAMA_405B = "meta-llama/Llama-3.1-405B"
CASES = (
    Case(
        name="mixtral-8x7b 2x24GB",
        task=model("mistralai/Mixtral-8x7B-v0.1", "2x24GB"),
        within_s=0.3,
        most_gap=MOST_GAP,
    ),
    Case(
        name="deepseek-v3 8x80GB",
        task=model("deepseek-ai/DeepSeek-V3", "8x80GB", ram="1TB"),
        within_s=2,
        most_gap=MOST_GAP,
        quick=False,
    ),
    Case(
        name="qwen3-235b-a22b 8x24GB",
        task=model("Qwen/Qwen3-235B-A22B", "8x24GB", ram="512GB"),
        within_s=2,
        most_gap=MOST_GAP,
        quick=False,
    ),
    Case(
        name="llama-3.1-405b 16 mixed",
        task=model(LLAMA_405B, "8x80GB,4x48GB,4x24GB", ram="512GB"),
        within_s=2,
        most_gap=MOST_GAP,
        quick=False,
    ),
    Case(name="llama-3.1-405b 64 mixed, 8 nodes", task=eight_nodes, within_s=10, most_gap=MOST_GAP, quick=False),
    Case(
        name="llama-3.1-405b 64 mixed, 1 node",
        task=model(LLAMA_405B, "16x80GB,24x48GB,24x24GB", ram="1TB"),
        within_s=10,
        most_gap=MOST_GAP,
        quick=False,
    ),
    Case(name="llama-3-70b 2x24GB", task=model("meta-llama/Meta-Llama-3-70B", "2x24GB", ram="128GB")),
    Case(name="llama-3-70b 1x24GB, disk", task=model("meta-llama/Meta-Llama-3-70B", "1x24GB", ram="64GB", disk="1TB")),
    Case(name="llama-3-8b 2x24GB, one is enough", task=model("meta-llama/Meta-Llama-3-8B", "2x24GB")),
    Case(name="llama-2-13b rtx4090 + l4", task=model("meta-llama/Llama-2-13b-hf", "1xrtx4090,1xl4")),
    Case(name="llama-2-13b l4 + 8GB", task=model("meta-llama/Llama-2-13b-hf", "1xl4,1x8GB")),
    Case(name="t5-large 2x2GB", task=model("google-t5/t5-large", "2x2GB")),
    Case(name="llama-3-8b CPU + disk", task=model("meta-llama/Meta-Llama-3-8B", 0, ram="12GB", disk="1TB")),
    Case(name="gemma-2-9b (tied) 1x16GB", task=model("google/gemma-2-9b", "1x16GB")),
    Case(name="mixtral-8x7b 2x24GB, batch 16", task=model("mistralai/Mixtral-8x7B-v0.1", "2x24GB", batch=16)),
    Case(name="llama-3-8b 1x24GB, batch 16", task=model("meta-llama/Meta-Llama-3-8B", "1x24GB", batch=16)),
    Case(name="llama-3-70b 2x24GB, batch 16", task=model("meta-llama/Meta-Llama-3-70B", "2x24GB", batch=16)),
    *(
        Case(
            name=f"graph {seed}: {GRAPH_NODES} nodes, {GRAPH_GPUS} GPUs",
            task=graph_task(seed, GRAPH_NODES),
            rules=Rules(time_limit_s=55),
            within_s=60,
            most_gap=MOST_GAP_OF_GRAPHS,
            quick=False,
        )
        for seed in range(3)
    ),
    *(
        Case(
            name=f"towers {seed}: {GRAPH_NODES} nodes, {GRAPH_GPUS} GPUs",
            task=graph_task(seed, GRAPH_NODES, random_graphs.mild_graph),
            rules=Rules(time_limit_s=55),
            within_s=60,
            most_gap=MOST_GAP_OF_GRAPHS,
            quick=False,
        )
        for seed in range(2)
    ),
    Case(
        name=f"graph 0: {SMALL_GRAPH_NODES} nodes, {GRAPH_GPUS} GPUs",
        task=graph_task(0, SMALL_GRAPH_NODES),
        rules=Rules(time_limit_s=55),
        within_s=60,
        most_gap=MOST_GAP_OF_GRAPHS,
    ),
)


def row_of(case: Case, *, with_plan: bool) -> Row:
    """Return the row of a case, made in this process; without a plan, only the peers'."""
    try:
        task = case.task()
    except Exception as exc:  # a case that cannot be asked is a row too
        return failed(case.name, f"{type(exc).__name__}: {exc}")
    found: dict[str, Any] = {}
    try:
        found = solved(task, case.rules) if with_plan else {}
    except Exception as exc:  # likewise
        found["error"] = f"{'' if isinstance(exc, PlanError) else 'crashed: '}{type(exc).__name__}: {exc}"
    scores = peers.scores(task)
    return Row(
        case=case.name,
        peers={name: score.simulated_ns for name, score in scores.items()},
        why={name: score.why for name, score in scores.items() if score.why is not None},
        **{"broken": [], **found},
    )


def solved(task: peers.Task, rules: Rules) -> dict[str, Any]:
    """Return what is measured of our own plan."""
    started = time.perf_counter()
    placements, slots, solver = find(task.graph, task.hardware, task.workload, rules)
    wall_s = time.perf_counter() - started
    plan = peers.plan_of(task, placements, slots=slots, solver=solver, rules=rules)
    return {
        "status": solver.status,
        "gap": round(solver.gap, 6),
        "wall_s": round(wall_s, 4),
        "objective_ns": solver.objective_ns,
        "simulated_ns": simulate.run(plan).total_ns,
        "broken": [violation.message for violation in verify_plan(plan)],
    }


def failed(case: str, error: str) -> Row:
    return Row(case=case, peers={}, why={}, broken=[], error=error)


def row_apart(case: Case) -> Row:
    """Return the row of a case, made in a process of its own; if that crashes or takes too long, the peers' alone."""
    try:
        return _made_apart(case, "all")
    except _NoRowError as exc:
        error = str(exc)
    try:
        return replace(_made_apart(case, "peers"), error=error)
    except _NoRowError:
        return failed(case.name, error)


class _NoRowError(Exception):
    """A process made no row; the message says why."""


def _made_apart(case: Case, part: str) -> Row:
    command = [sys.executable, __file__, "--case", case.name, "--here", part]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CASE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise _NoRowError(f"no answer within {CASE_LIMIT_S} s") from exc
    if done.returncode:
        raise _NoRowError(f"its process ended with status {done.returncode}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


# What the plans are held to


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A claim, whether it holds (None: no row speaks of it), and the rows that break it."""

    target: str
    holds: bool | None
    missed: list[str]


def targets(cases: Sequence[Case], rows: Sequence[Row]) -> list[Target]:
    """Return every target with the verdict of the rows."""
    result = []
    for case, row in zip(cases, rows, strict=True):
        if case.within_s is None or case.most_gap is None:
            continue
        claim = f"{case.name}: within {case.within_s:g} s, optimal or within {case.most_gap:.0%} of its bound"
        result.append(verdict(claim, [(row, missed_proof(case, row))]))
    planned = [row for row in rows if row.simulated_ns is not None]
    raced = [row for row in planned if best_peer(row) is not None]
    possible = [row for row in rows if best_peer(row) is not None]
    result += [
        verdict("objective and simulation agree within 2 %", [(row, missed_agreement(row)) for row in planned]),
        verdict("never slower than a peer", [(row, missed_race(row)) for row in raced]),
        verdict("a plan wherever a peer has one", [(row, missed_plan(row)) for row in possible]),
        verdict("verify accepts every plan", [(row, next(iter(row.broken), None)) for row in planned]),
    ]
    return result


def verdict(claim: str, missed: Sequence[tuple[Row, str | None]]) -> Target:
    words = [f"{row.case}: {why}" for row, why in missed if why is not None]
    return Target(target=claim, holds=not words if missed else None, missed=words)


def missed_proof(case: Case, row: Row) -> str | None:
    if row.wall_s is None or row.gap is None:
        return row.error or "no plan"
    assert case.within_s is not None
    assert case.most_gap is not None
    words = [f"took {row.wall_s:.2f} s"] * (row.wall_s > case.within_s)
    words += [f"gap {row.gap:.2%}"] * (row.status != "optimal" and row.gap > case.most_gap)
    return ", ".join(words) or None


def missed_agreement(row: Row) -> str | None:
    difference = difference_of(row)
    return None if difference is None or abs(difference) <= MOST_DIFFERENCE else f"simulated {difference:+.1%}"


def difference_of(row: Row) -> float | None:
    """Return by how much the simulated time is above the solver's objective, as a fraction of that."""
    if not row.objective_ns or row.simulated_ns is None:
        return None
    return row.simulated_ns / row.objective_ns - 1


def missed_race(row: Row) -> str | None:
    best = best_peer(row)
    if best is None or row.simulated_ns is None or row.simulated_ns <= best[1]:
        return None
    return f"{best[0]} is {row.simulated_ns / best[1] - 1:.2%} faster"


def missed_plan(row: Row) -> str | None:
    best = best_peer(row)
    return None if best is None or row.simulated_ns is not None else f"{best[0]} has one ({row.error})"


def best_peer(row: Row) -> tuple[str, int] | None:
    """Return the fastest peer and its simulated time, or None where none has a map that fits."""
    known = [(value, name) for name, value in row.peers.items() if value is not None]
    return min(known)[::-1] if known else None


# On paper


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of at most 100 columns; last, how many times as slow the best peer is, and which."""
    lines = [f"{'case':33}{'status':>9}{'gap %':>7}{'wall s':>8}{'planned':>8}{'simul. s':>9}  times, best peer"]
    for row in rows:
        best = best_peer(row)
        peer = "none fits" if best is None else f"{seconds(best[1])}, {best[0]}"
        if best is not None and row.simulated_ns:
            peer = f"{best[1] / row.simulated_ns:.2f} {best[0]}"
        peer = peer.replace("accelerate", "acc.").replace(", told to leave room", " told")
        gap = "-" if row.gap is None else f"{row.gap:.2%}"[:-1]
        wall = "-" if row.wall_s is None else f"{row.wall_s:.3f}"
        numbers = f"{gap:>7}{wall:>8}{seconds(row.objective_ns):>8}{seconds(row.simulated_ns):>9}"
        lines.append(f"{row.case:33}{row.status or 'failed':>9}{numbers}  {peer}"[:100])
        if row.error is not None:
            lines.append(f"    {row.error}"[:100])
    return "\n".join(lines)


def seconds(value_ns: int | None) -> str:
    return "-" if value_ns is None else f"{value_ns / 1e9:.4g}"


def summary(verdicts: Sequence[Target]) -> str:
    """Return the targets, each with what breaks it below."""
    words = {True: "holds ", False: "MISSED", None: "not run"}
    lines = []
    for entry in verdicts:
        lines.append(f"{words[entry.holds]}  {entry.target}")
        lines += [f"        {text}"[:100] for text in entry.missed]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, instead of tables")
    parser.add_argument("--quick", action="store_true", help="only the cases that take seconds")
    parser.add_argument("--case", action="append", metavar="NAME", help="only cases whose name contains this")
    parser.add_argument("--here", choices=("all", "peers"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        (case,) = (case for case in CASES if case.name == given.case[0])
        print(json.dumps(asdict(row_of(case, with_plan=given.here == "all"))))
        return
    chosen = [case for case in CASES if case.quick or not given.quick]
    if given.case:
        chosen = [case for case in chosen if any(word in case.name for word in given.case)]
    if not chosen:
        parser.error(f"no such case; there are: {'; '.join(case.name for case in CASES)}")
    rows = []
    for case in chosen:
        rows.append(row_apart(case))
        print(table(rows[-1:]).partition("\n")[2], file=sys.stderr, flush=True)
    verdicts = targets(chosen, rows)
    if given.json:
        result = {
            "benchmark": "placement",
            "rows": [asdict(row) for row in rows],
            "targets": [asdict(entry) for entry in verdicts],
            "machine": describe(),
        }
        print(json.dumps(result, indent=1))
        return
    print(table(rows), summary(verdicts), sep="\n\n")


if __name__ == "__main__":
    main()
