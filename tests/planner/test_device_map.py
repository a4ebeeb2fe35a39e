"""Device maps: which entry holds for which tensor, what becomes of it as a plan, and what is refused."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import transformers

import peers
import planner
import simulate
from planner import memory
from planner.accelerate_map import auto_map
from planner.device_map import MAPPED, DeviceMap
from planner.errors import InputError
from planner.given import build_on_meta, describe
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware
from planner.plan import Plan
from small_cases import MIB, build_graph, end_kind, gpu, group, machine, span

WORK = planner.Workload(prompt_tokens=8, new_tokens=3)
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def hardware(gpus: int = 2, mib: int = 400) -> Hardware:
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(gpus)]
    sizes = {device.name: mib * MIB for device in devices} | {"cpu": 400 * MIB, "disk": 800 * MIB}
    return machine(devices, sizes)


def graph(blocks: int = 12, *, tied: bool = False) -> LayerGraph:
    """Return embed, blocks of attn, experts and rest, and head."""
    block = LayerKind(
        name="Block",
        groups=(group("attn", 4 * MIB), group("experts", MIB, slices=4), group("rest", MIB // 4, streamable=False)),
    )
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB), block]
    spans = [[span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3 for _ in kinds]
    layers = [("embed", 0), *[(f"layers.{i}", 2) for i in range(blocks)], ("head", 1)]
    ties = (("embed.weights.weight", "head.weights.weight"),) if tied else ()
    return build_graph(kinds, spans, layers, ties=ties, loose_bytes=64)


def mapped(device_map: dict[str, int | str], *, on: Hardware | None = None, tied: bool = False) -> Plan:
    return planner.plan_from_device_map(graph(tied=tied), device_map, hardware=on or hardware(), workload=WORK)


def homes(plan: Plan, layer: str) -> dict[str, tuple[str, str]]:
    return {entry.group: (entry.home, entry.run_on) for entry in plan.placements if entry.layer == layer}


def test_the_longest_path_above_a_tensor_holds() -> None:
    draw = random.Random(3)
    names = [f"{a}.{b}.{c}" for a in ("layers", "layer") for b in ("1", "10", "11") for c in ("attn", "attn_norm")]
    keys = sorted({name.rsplit(".", cut)[0] for name in names for cut in range(3)} | {""})
    for _ in range(200):
        places = {key: draw.choice([0, 1, "cpu", "disk"]) for key in draw.sample(keys, draw.randint(1, len(keys)))}
        found = DeviceMap.read(places, hardware())
        for name in names:
            above = [key for key in places if key in ("", name) or name.startswith(f"{key}.")]
            best = max(above, key=len, default=None)
            expected = None if best is None else {0: "cuda:0", 1: "cuda:1"}.get(places[best], places[best])  # type: ignore[call-overload]
            assert found.place_of(name) == expected, (name, places)


def test_homes_are_the_maps_and_what_waits_runs_on_its_first_gpu() -> None:
    plan = mapped({"embed": 1, "layers.1": "cuda:1", "layers.10": "cpu", "layers.11": "disk", "head": 1, "layers": 1})
    assert homes(plan, "layers.1")["attn"] == ("cuda:1", "cuda:1")
    assert homes(plan, "layers.10") == {
        "attn": ("cpu", "cuda:1"), "experts": ("cpu", "cuda:1"), "rest": ("cuda:1", "cuda:1"),
    }  # fmt: skip
    assert homes(plan, "layers.11")["experts"] == ("disk", "cuda:1")
    assert planner.verify_plan(plan) == ()
    assert plan.solver is None
    assert plan.prediction is not None
    assert plan.assumptions[0] == MAPPED
    assert plan.assumptions[1].startswith("524.3 kB that the map lets wait elsewhere")


def test_without_a_gpu_in_the_map_everything_runs_on_the_cpu() -> None:
    plan = mapped({"": "cpu", "layers.3": "disk"})
    assert set(plan.run_on()) == {"cpu"}
    assert homes(plan, "layers.3") == dict.fromkeys(("attn", "experts", "rest"), ("disk", "cpu"))
    assert planner.verify_plan(plan) == ()


def test_a_layer_is_placed_by_group_where_the_map_splits_it() -> None:
    plan = mapped({"": 0, "layers.2.experts": "cpu", "layers.3": 1, "layers.3.attn": "disk"})
    assert homes(plan, "layers.2") == {
        "attn": ("cuda:0", "cuda:0"), "experts": ("cpu", "cuda:0"), "rest": ("cuda:0", "cuda:0"),
    }  # fmt: skip
    assert homes(plan, "layers.3")["attn"] == ("disk", "cuda:1")
    assert planner.verify_plan(plan) == ()


def test_every_byte_is_where_the_map_says() -> None:
    draw = random.Random(7)
    for _ in range(40):
        given: dict[str, int | str] = {
            f"layers.{i}.{part}": place
            for i in range(12)
            for device in [draw.choice([0, 1])]
            for part in ("attn", "experts", "rest")
            for place in [device if part == "rest" else draw.choice([device, "cpu", "disk"])]
        }
        plan = mapped({**given, "embed": 0, "head": 1})
        assert planner.verify_plan(plan) == ()
        held: dict[str, int] = {}
        for name, place in given.items():
            size = {"attn": 4 * MIB, "experts": 4 * MIB, "rest": MIB // 4}[name.rpartition(".")[2]]
            where = f"cuda:{place}" if isinstance(place, int) else str(place)
            held[where] = held.get(where, 0) + size
        static = memory.static_usage(plan.graph, plan.hardware, plan.placements, plan.slots)
        for where in ("cpu", "disk"):
            assert static[where].weights == held.get(where, 0)


def test_a_tied_tensor_may_be_covered_by_its_twin() -> None:
    plan = mapped({"embed": 0, "layers": 0}, tied=True)
    assert homes(plan, "head") == {"weights": ("cuda:0", "cuda:0")}
    assert plan.prediction is not None
    apart = mapped({"embed": 0, "layers": 0, "head": 0})
    assert apart.prediction is not None
    assert apart.prediction.peak_bytes["cuda:0"] - plan.prediction.peak_bytes["cuda:0"] == MIB


def test_a_map_that_overfills_is_predicted_and_does_not_verify() -> None:
    plan = mapped({"": 0}, on=hardware(1, mib=64))
    assert plan.prediction is not None
    assert plan.prediction.peak_bytes["cuda:0"] > 64 * MIB
    assert [entry.rule for entry in planner.verify_plan(plan)] == ["capacity"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the device map is empty"),
        ({"": 2}, r'"" \(all that is left\) on 2, and there is no such device; there are cuda:0, cuda:1, cpu, disk'),
        ({"": 0, "head": "cuda:7"}, "'head' on 'cuda:7', and there is no such device"),
        ({"": True}, "on True, and there is no such device"),
        ({"": 0, "layer.1": 1}, r"names 'layer.1'; the model has no such module; try layers.1\b"),
        ({"": 0, "x": 1, "y": 1}, r"names 'x' \(and 1 more that are not there\)"),
        ({"layers": 0, "head": 0}, 'says nothing of embed.weights.weight; add their modules, or ""'),
        ({"layers.1": 0}, "says nothing of embed.weights.weight and of 34 others"),
        ({"": 0, "layers.2.attn": 1}, "splits layers.2 between cuda:0 and cuda:1; a layer runs on one device"),
    ],
)
def test_what_cannot_be_followed_is_one_message(given: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mapped(given)


def test_a_map_to_a_disk_that_is_not_there_is_refused() -> None:
    none = hardware()
    pools = tuple(dataclasses.replace(p, capacity_bytes=0) if p.name == "disk" else p for p in none.pools)
    with pytest.raises(InputError, match="puts 'head' on disk, and the machine has none"):
        mapped({"": 0, "head": "disk"}, on=dataclasses.replace(none, pools=pools))


def test_rules_and_searches_are_refused_beside_a_map() -> None:
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=2)
    with pytest.raises(InputError, match="rules cannot be followed"):
        planner.plan_from_device_map(config, {"": 0}, gpus="24GB", rules=planner.Rules(never_on_disk=True))
    with pytest.raises(InputError, match="a device map is for one"):
        planner.plan_from_device_map(config, {"": 0}, gpus="24GB", objective="max-batch")


def test_a_models_map_is_the_plan_that_is_made_where_all_fits() -> None:
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=3)
    options: dict[str, Any] = {"gpus": "24GB", "prompt_tokens": 9, "new_tokens": 4, "weight_dtype": "bfloat16"}
    # A module without weights may be named.
    plan = planner.plan_from_device_map(config, {"": 0, "model.layers.1.mlp.act_fn": 0}, **options)
    best = planner.plan_model(config, **options)
    assert plan.placements == best.placements
    assert plan.prediction == best.prediction
    timeline = simulate.run({"": 0}, model=config, **options)
    assert timeline == simulate.run(best)
    with pytest.raises(InputError, match="no such module"):
        planner.plan_from_device_map(config, {"": 0, "model.layers.7": 0}, **options)
    with pytest.raises(InputError, match="give model="):
        simulate.run({"": 0})
    with pytest.raises(InputError, match="give them with a device map only"):
        simulate.run(best, model=config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_accelerates_own_map_is_followed(kind: str) -> None:
    pytest.importorskip("accelerate")
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SHAPE, num_hidden_layers=6, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=6, n_head=4),
        "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_hidden_layers=4, num_local_experts=4),
    }
    config = configs[kind]()
    model = build_on_meta(describe(config), "float32")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    options: dict[str, Any] = {"prompt_tokens": 9, "new_tokens": 3, "weight_dtype": "float32"}
    devices = Hardware.from_options("2x24GB").with_max_memory({0: weights // 2, 1: weights // 4, "cpu": weights // 8})
    found = auto_map(model, devices)
    assert len(set(found.values())) > 1
    plan = planner.plan_from_device_map(config, found, hardware=devices, **options)
    assert {entry.rule for entry in planner.verify_plan(plan)} <= {"capacity"}
    read = DeviceMap.read(found, devices)
    whole = dict.fromkeys(("cuda:0", "cuda:1", "cpu", "disk"), 0)
    for name, parameter in model.named_parameters():
        place = read.place_of(name)
        assert place is not None
        whole[place] += parameter.numel() * 4
    # transformers' from_pretrained(device_map="auto") makes the same map.
    task = peers.Task(graph=plan.graph, hardware=devices, workload=plan.workload, model=model)
    assert found == peers.device_map(task, "auto", peers.max_memory_of(devices))
    # As accelerate counts: what it gave each memory is no more than it was told.
    for pool in devices.pools[:-1]:
        assert whole[pool.name] <= pool.usable_bytes
