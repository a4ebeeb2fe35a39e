"""Random layer graphs and machines for them: branches, joins and skips, unequal layers, GPUs and links, tight memory.

The same seed gives the same graph and machine. One forward call without a cache is all the work there is.
"""

from __future__ import annotations

import random

from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span, Tensor, WeightGroup
from planner.hardware import Device, Hardware, Link, MemoryPool
from planner.units import GB, MB, MIB
from planner.workload import Workload

WORKLOAD = Workload(caller="forward", batch_size=1, prompt_tokens=512, new_tokens=1)
# Bytes that GPUs have for weights, as a multiple of those of all layers.
TIGHTNESS = 1.15
HOST_BYTES = 64 * GB
# (matmul FLOP/s, memory bytes/s, host link bytes/s) of three generations of GPUs.
_GENERATIONS = (
    (250 * 10**12, 1800 * GB, 25 * GB),
    (130 * 10**12, 900 * GB, 22 * GB),
    (50 * 10**12, 300 * GB, 12 * GB),
)


def random_graph(seed: int, nodes: int) -> LayerGraph:
    """Return a connected graph of `nodes` layers in one topological order, from one input to one output.

    Layers take 0.4 ms on the fastest GPU in the mean, and what one makes 0.3 ms or more on a link between GPUs.
    """
    rng = random.Random(seed)
    sources = _sources(rng, nodes)
    weights = [_aligned(MB * min(400.0, rng.lognormvariate(3.4, 1.0))) for _ in range(nodes)]
    outputs = [_aligned(MB * min(64.0, rng.lognormvariate(0.5, 1.2))) for _ in range(nodes)]
    return _graph(rng, f"random graph {seed} of {nodes} nodes", sources, weights, outputs, (200, 4000))


def mild_graph(seed: int, nodes: int) -> LayerGraph:
    """Return such a graph with the sizes of language and vision towers, of which transfers are a smaller part.

    A transformer block of width h has 12 h² weights: 403 MB in bf16 at h = 4,096, 226 MB at 3,072. On 512 tokens each
    byte of them takes 512 FLOPs, and it hands on 512 h values: 4.2 MB and 3.1 MB. That is 0.5 to 0.8 ms on the fastest
    GPU and 2.3 to 4 on the slowest, against 0.3 to 0.7 ms on a link between GPUs.
    """
    rng = random.Random(f"mild {seed}")
    sources = _sources(rng, nodes)
    widths = [rng.choice((2560, 3072, 3584, 4096)) for _ in range(nodes)]
    weights = [_aligned(2 * 12 * width**2) for width in widths]
    outputs = [_aligned(2 * WORKLOAD.prompt_tokens * width) for width in widths]
    per_byte = (WORKLOAD.prompt_tokens, WORKLOAD.prompt_tokens)
    return _graph(rng, f"mild graph {seed} of {nodes} nodes", sources, weights, outputs, per_byte)


def _graph(
    rng: random.Random,
    model: str,
    sources: list[list[int]],
    weights: list[int],
    outputs: list[int],
    per_byte: tuple[int, int],
) -> LayerGraph:
    """per_byte: FLOPs for each byte of weights, from and to."""
    nodes = len(weights)
    kinds, spans = [], []
    for index in range(nodes):
        tensor = Tensor(name="weight", shape=(weights[index] // 2,), dtype="bfloat16", nbytes=weights[index])
        group = WeightGroup(name="weights", slices=1, used_slices=1, streamable=True, tensors=(tensor,))
        kinds.append(LayerKind(name=f"Node{index}", groups=(group,)))
        taken = sum(outputs[source] for source in sources[index])
        span = Span(
            count=1, held_bytes=taken, peak_bytes=2 * outputs[index], scratch_bytes=0, kv_before_bytes=0,
            kv_after_bytes=0, input_bytes=taken, flops=int(weights[index] * rng.uniform(*per_byte)),
            moved_bytes=weights[index] + taken + outputs[index], operators=rng.randint(4, 30),
        )  # fmt: skip
        spans.append(span)
    graph = LayerGraph(
        model=model,
        batch_size=1,
        kinds=tuple(kinds),
        layers=tuple(Layer(name=f"node{index}", kind=index) for index in range(nodes)),
        edges=tuple(
            Edge(source=source, target=target, prefill_bytes=outputs[source], decode_bytes=outputs[source])
            for target in range(nodes)
            for source in sources[target]
        ),
        ties=(),
        loose=(),
        allocator_bytes=22 * MIB,
        passes=(
            Pass(
                name="prefill",
                tokens=WORKLOAD.prompt_tokens,
                context_tokens=WORKLOAD.prompt_tokens,
                spans=tuple(spans),
            ),
        ),
    )
    graph.check()
    return graph


def _sources(rng: random.Random, nodes: int) -> list[list[int]]:
    """Return what each node takes; what nothing has taken yet is an open branch, and the last node joins them all."""
    sources: list[list[int]] = [[]]
    open_ends = [0]
    for index in range(1, nodes):
        if index == nodes - 1:
            taken = list(open_ends)
        elif len(open_ends) > 1 and (rng.random() < 0.2 or len(open_ends) > 6):
            taken = rng.sample(open_ends, rng.randint(2, min(4, len(open_ends))))
        elif rng.random() < 0.2:
            taken = [rng.randrange(max(0, index - 12), index)]
        else:
            taken = [rng.choice(open_ends)]
        if rng.random() < 0.15:
            taken.append(rng.randrange(max(0, index - 40), index))
        sources.append(sorted(set(taken)))
        open_ends = [end for end in open_ends if end not in taken] + [index]
    return sources


def random_machine(seed: int, graph: LayerGraph, gpus: int) -> Hardware:
    """Return a machine of unequal GPUs, of which together TIGHTNESS of the weights fit; pairs have a fast link."""
    rng = random.Random(f"machine {seed}")
    generations = [rng.choice(_GENERATIONS) for _ in range(gpus)]
    shares = [rng.uniform(0.6, 1.6) for _ in range(gpus)]
    context, workspace = 300 * MB, 8 * MIB
    work = max(span.requested_bytes for span in graph.passes[0].per_layer())
    devices, pools, links = [], [], []
    for index, (flops, rate, link) in enumerate(generations):
        name = f"cuda:{index}"
        device = Device(
            name=name, kind="cuda", product=f"generation {_GENERATIONS.index(generations[index])}", pool=name,
            flops_per_s={"bfloat16": flops, "default": flops // 2}, bytes_per_s=rate, operator_ns=8000,
            context_bytes=context, workspace_bytes=workspace,
        )  # fmt: skip
        devices.append(device)
        own = int(TIGHTNESS * graph.weight_bytes * shares[index] / sum(shares))
        size = own + context + workspace + graph.allocator_bytes + work
        pools.append(MemoryPool(name=name, capacity_bytes=size, reserved_bytes=0))
        links.append(Link(source="cpu", target=name, bytes_per_s=link, latency_ns=10_000))
        links.append(Link(source=name, target="cpu", bytes_per_s=link, latency_ns=10_000))
        for other in range(gpus):
            if other == index:
                continue
            is_pair = other == index ^ 1
            rate = 100 * GB if is_pair else min(link, generations[other][2]) // 2
            latency = 5_000 if is_pair else 20_000
            links.append(Link(source=name, target=f"cuda:{other}", bytes_per_s=rate, latency_ns=latency))
    host = Device(
        name="cpu", kind="cpu", product="host", pool="cpu", flops_per_s={"default": 10**12}, bytes_per_s=60 * GB,
        operator_ns=8000, context_bytes=0, workspace_bytes=0,
    )  # fmt: skip
    pools.append(MemoryPool(name="cpu", capacity_bytes=HOST_BYTES, reserved_bytes=4 * GB))
    pools.append(MemoryPool(name="disk", capacity_bytes=1000 * GB, reserved_bytes=0))
    links.append(Link(source="disk", target="cpu", bytes_per_s=3 * GB, latency_ns=100_000))
    return Hardware(devices=(*devices, host), pools=tuple(pools), links=tuple(links))


def _aligned(nbytes: float) -> int:
    """Return whole multiples of 256 bytes, one at least."""
    return max(1, round(nbytes / 256)) * 256
