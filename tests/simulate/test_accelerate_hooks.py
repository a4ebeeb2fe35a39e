"""Accelerate's hooks, simulated: held to Accelerate itself running on this CPU, and to sums made another way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import planner
import simulate
from planner import cost
from planner.errors import InputError
from planner.graph import LayerKind, Tensor, WeightGroup
from planner.hardware import Hardware
from planner.plan import Plan
from simulate.accelerate_hooks import DISK_TENSOR_NS, HOST_TENSOR_NS, MODULE_NS
from small_cases import MIB, build_graph, end_kind, gpu, machine, span

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_hidden_layers=3),
    "tied": lambda: transformers.LlamaConfig(**SHAPE, num_hidden_layers=3, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **SHAPE, num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4),
}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "tied": "model.layers", "mixtral": "model.layers"}


def planned(kind: str, device_map: dict[str, int | str], gpus: str | int = "2x24GB", new_tokens: int = 5) -> Plan:
    return planner.plan_from_device_map(
        CONFIGS[kind](), device_map, gpus=gpus, prompt_tokens=9, new_tokens=new_tokens, weight_dtype="float32"
    )


def spread(kind: str) -> dict[str, int | str]:
    """Return a map with blocks in every kind of place."""
    blocks = BLOCKS[kind]
    return {"": 0, f"{blocks}.0": 1, f"{blocks}.1": "cpu", f"{blocks}.2": "disk"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_overlaps_and_nothing_stands_idle(kind: str) -> None:
    device_map = spread(kind)
    timeline = simulate.run_accelerate(planned(kind, device_map), device_map)
    starts = timeline.step_starts()
    assert timeline.simulated_steps == (0, 1, 4)
    assert timeline.kept_ns == tuple((starts[step], starts[step + 1]) for step in (0, 1, 4))
    for step in timeline.simulated_steps:
        own = [entry for entry in timeline.intervals if entry.step == step]
        assert (own[0].start_ns, own[-1].end_ns) == (starts[step], starts[step + 1])
        for one, other in pairwise(own):
            assert one.end_ns == other.start_ns
    assert sum(use.decode for use in timeline.utilisation()) == pytest.approx(1)
    assert [sample.time_ns for sample in timeline.memory] == sorted(sample.time_ns for sample in timeline.memory)
    assert timeline.memory[-1].time_ns == timeline.total_ns
    for step in timeline.simulated_steps:
        taken = sum(entry.duration_ns for entry in timeline.intervals if entry.step == step)
        assert taken == timeline.step_ns[step]
    assert len(timeline.step_ns) == 5
    between = timeline.step_ns[1:]
    assert min(between[0], between[-1]) <= min(between) <= max(between) <= max(between[0], between[-1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_decode_step_is_the_sum_of_its_copies_its_hooks_and_what_it_computes(kind: str) -> None:
    device_map = spread(kind)
    plan = planned(kind, device_map)
    timeline = simulate.run_accelerate(plan, device_map)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    hardware = plan.hardware
    up, read = hardware.link("cpu", "cuda:0"), hardware.link("disk", "cpu")
    pageable = int(up.bytes_per_s * hardware.pageable_fraction)
    expected = 0
    for place in ("cpu", "disk"):
        (block,) = [name for name, where in device_map.items() if where == place]
        for parameter in model.get_submodule(block).parameters():
            nbytes = parameter.numel() * 4
            expected += up.latency_ns + nbytes * 10**9 // pageable
            expected += HOST_TENSOR_NS if place == "cpu" else DISK_TENSOR_NS
            expected += 0 if place == "cpu" else read.latency_ns + nbytes * 10**9 // read.bytes_per_s
        hooked = sum(len(module.state_dict()) > 0 for module in model.get_submodule(block).modules())
        expected += hooked * MODULE_NS
    (entry,) = [each for each in plan.graph.passes if each.name == "decode_first"]
    waiting = [name for name, where in device_map.items() if where in ("cpu", "disk")]
    for index, (layer, own) in enumerate(zip(plan.graph.layers, entry.per_layer(), strict=True)):
        device = hardware.device("cuda:1" if device_map.get(layer.name) == 1 else "cuda:0")
        whole = cost.layer_ns(plan.graph, index, own, device, tokens=1, dtype="float32", prefill=False)
        if layer.name not in waiting:
            module = model.get_submodule(layer.name)
            hooked = sum(len(each.state_dict()) > 0 for each in module.modules())
            whole = max(whole, own.operators * device.operator_ns + hooked * MODULE_NS)
        expected += whole
    hops = sum(i.duration_ns for i in timeline.intervals if i.step == 1 and i.action == "hop")
    assert hops > 0
    assert abs(timeline.step_ns[1] - expected - hops) <= len(plan.graph.layers)


def test_all_experts_are_moved_for_one_token() -> None:
    device_map = spread("mixtral")
    plan = planned("mixtral", device_map)
    timeline = simulate.run_accelerate(plan, device_map)
    copies = [i for i in timeline.intervals if i.step == 1 and i.action == "copy" and "experts" in i.label]
    # Two fused tensors in each of the two blocks that wait.
    assert len(copies) == 4
    link = plan.hardware.link("cpu", "cuda:0")
    rate = link.bytes_per_s * plan.hardware.pageable_fraction
    experts = 2 * 8 * 3 * SHAPE["hidden_size"] * SHAPE["intermediate_size"] * 4
    assert sum(i.duration_ns - link.latency_ns for i in copies) == pytest.approx(experts * 1e9 / rate, rel=1e-3)
    # What is brought at once is one module's, not a layer's.
    brought = max(sample.slots for sample in timeline.memory if sample.device == "cuda:0")
    assert brought == experts // 2


def test_buffers_do_not_wait() -> None:
    weights, table = 4 * MIB, MIB
    tensors = (
        Tensor(name="proj.weight", shape=(weights // 4,), dtype="float32", nbytes=weights),
        Tensor(name="proj.table", shape=(table // 4,), dtype="float32", nbytes=table, buffer=True),
    )
    block = LayerKind(
        name="Block",
        groups=(WeightGroup(name="proj", slices=1, used_slices=1, streamable=True, tensors=tensors),),
    )
    kinds = [end_kind("Embedding", MIB), block]
    graph = build_graph(kinds, [[span(moved=10**6)] * 3] * 2, [("embed", 0), ("block", 1)])
    on = machine([gpu(0, product="big", flops=10**14, rate=10**12)], {"cuda:0": 10**9, "cpu": 10**9, "disk": 10**9})
    device_map: dict[str, int | str] = {"": 0, "block": "cpu"}
    work = planner.Workload(prompt_tokens=8, new_tokens=3)
    plan = planner.plan_from_device_map(graph, device_map, hardware=on, workload=work)
    timeline = simulate.run_accelerate(plan, device_map)
    assert [i.label for i in timeline.intervals if i.action == "copy" and i.step == 1] == ["block proj.weight"]
    held = {sample.device: sample.weights for sample in timeline.memory}
    assert held == {"cuda:0": MIB + table, "cpu": weights, "disk": 0}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_is_held_where_the_map_says(kind: str) -> None:
    device_map = spread(kind)
    plan = planned(kind, device_map)
    timeline = simulate.run_accelerate(plan, device_map)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
    for place in ("cpu", "disk"):
        (block,) = [name for name, where in device_map.items() if where == place]
        nbytes = sum(parameter.numel() * 4 for parameter in model.get_submodule(block).parameters())
        assert {sample.weights for sample in timeline.memory if sample.device == place} == {nbytes}
    (layer,) = [name for name, where in device_map.items() if where == 1]
    own = sum(-(-parameter.numel() * 4 // 512) * 512 for parameter in model.get_submodule(layer).parameters())
    assert {sample.weights for sample in timeline.memory if sample.device == "cuda:1"} == {own}
    assert timeline.peak_bytes("cuda:1") >= own


def test_a_tied_head_comes_only_where_its_twin_is_not_there() -> None:
    plan = planned("tied", {"": 0})
    for embed, head, comes in ((0, "cpu", 0), (0, "disk", 1), ("cpu", "cpu", 1), (1, "cpu", 1)):
        device_map: dict[str, int | str] = {"": 0, "model.embed_tokens": embed, "lm_head": head, "model.layers.0": 0}
        device_map = device_map if embed != 1 else {**device_map, "": 1, "model.layers.0": 0}
        timeline = simulate.run_accelerate(plan, device_map)
        copies = [i.label for i in timeline.intervals if i.action == "copy" and i.step == 1 and "lm_head" in i.label]
        assert len(copies) == comes, (embed, head)


def test_without_a_map_the_plans_homes_are_taken() -> None:
    device_map: dict[str, int | str] = {"": 0, "model.layers.1.mlp": "cpu", "model.layers.2.self_attn": "disk"}
    plan = planned("llama", device_map)
    assert simulate.run_accelerate(plan) == simulate.run_accelerate(plan, device_map)


def test_what_is_resident_costs_its_hooks_only_where_the_host_is_what_binds() -> None:
    plan = planned("llama", {"": 0})
    ours, theirs = simulate.run(plan), simulate.run_accelerate(plan)
    assert 0 < theirs.step_ns[1] - ours.step_ns[1] < 60 * MODULE_NS
    fast = tuple(dataclasses.replace(device, operator_ns=0, bytes_per_s=10**6) for device in plan.hardware.devices)
    slow = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, devices=fast))
    assert simulate.run_accelerate(slow).step_ns[1] == pytest.approx(simulate.run(slow).step_ns[1], rel=1e-6)


def test_what_goes_to_another_gpu_is_sent_to_each_layer_again() -> None:
    both = planned("llama", {"": 0, "model.layers.0": 1, "model.layers.1": 1})
    sent = Counter(i.label for i in simulate.run_accelerate(both).intervals if i.action == "hop" and i.step == 1)
    once = Counter(i.label for i in simulate.run(both).intervals if i.action == "hop" and i.step == 1)
    assert sum(sent.values()) > sum(once.values())
    assert sent["→ model.layers.1"] == sent["→ model.layers.0"] - 1


def test_chunks_of_the_prompt_are_calls_of_their_own() -> None:
    options: dict[str, Any] = {"gpus": "24GB", "new_tokens": 2, "weight_dtype": "float32"}
    device_map: dict[str, int | str] = {"": 0, "model.layers.1": "cpu"}
    whole, cut = (
        simulate.run_accelerate(
            planner.plan_from_device_map(
                CONFIGS["llama"](), device_map, prompt_tokens=26, prefill_chunk=chunk, **options
            ),
            device_map,
        )
        for chunk in (None, 4)
    )
    brought = sum(i.duration_ns for i in whole.intervals if i.step == 0 and i.action == "copy")
    starts = [i.start_ns for i in cut.intervals]
    assert starts == sorted(starts)
    # The first whole chunk, the second, the last, what is left of the prompt, and a decode step.
    assert len(cut.kept_ns) == 5
    assert all(one[1] <= other[0] for one, other in pairwise(cut.kept_ns))
    assert cut.kept_ns[-1][1] == cut.intervals[-1].end_ns == cut.total_ns
    # Seven calls, each of which brings the block again.
    assert 7 * brought < 0.8 * 7 * whole.prefill_ns < cut.prefill_ns < 7 * whole.prefill_ns


def test_a_cache_in_host_memory_is_refused() -> None:
    plan = planner.plan_from_device_map(
        CONFIGS["llama"](), {"": 0}, gpus="24GB", prompt_tokens=9, new_tokens=2, cache="offloaded"
    )
    with pytest.raises(InputError, match="take a dynamic one"):
        simulate.run_accelerate(plan)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_accelerate_itself_reads_these_tensors_and_has_these_hooks(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    offload = pytest.importorskip("accelerate.utils.offload")
    blocks = BLOCKS[kind]
    device_map: dict[str, int | str] = {"": "cpu", f"{blocks}.1": "disk", f"{blocks}.2": "disk"}
    plan = planned(kind, device_map, gpus=0, new_tokens=3)
    timeline = simulate.run_accelerate(plan, device_map)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    children = {name: "cpu" for name, module in model.named_modules() if "." not in name and name}
    top = blocks.partition(".")[0]
    del children[top]
    children |= {f"{top}.{name}": "cpu" for name, _ in model.get_submodule(top).named_children()}
    del children[blocks]
    children |= {f"{blocks}.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    model = accelerate.dispatch_model(model, children, main_device="cpu", offload_dir=str(tmp_path))
    read: list[str] = []
    before = offload.load_offloaded_weight

    def counted(path: str, info: Any) -> Any:
        read.append(Path(path).name.removesuffix(".dat"))
        return before(path, info)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "load_offloaded_weight", counted)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.long))
    reads = [i.label.replace(" ", ".") for i in timeline.intervals if i.action == "read" and i.step == 1]
    assert sorted(reads) == sorted(read)
    hooks = sum(hasattr(module, "_hf_hook") for _, module in model.get_submodule(f"{blocks}.1").named_modules())
    told = sum(i.duration_ns for i in timeline.intervals if i.label == f"{blocks}.1 hooks" and i.step == 1)
    # Activation functions have none: nothing of theirs is in the state that hooks are made by.
    assert told == hooks * MODULE_NS


def test_more_disk_is_slower_than_host_memory_and_that_than_none() -> None:
    times = []
    for place in (0, "cpu", "disk"):
        device_map: dict[str, int | str] = {"": 0, "model.layers.1": place}
        times.append(simulate.run_accelerate(planned("llama", device_map), device_map).decode_ns_per_token)
    assert times == sorted(set(times))


def test_hardware_without_gpus_is_carried() -> None:
    plan = planned("llama", {"": "cpu"}, gpus=0)
    assert isinstance(plan.hardware, Hardware)
    assert simulate.run_accelerate(plan).peak_bytes("cpu") > plan.graph.weight_bytes


def test_a_map_is_drawn_by_a_seed_as_its_plan_is() -> None:
    device_map: dict[str, int | str] = {"": 0, "model.layers.1": "cpu"}
    plan = planned("mixtral", device_map)
    options: dict[str, Any] = {"model": CONFIGS["mixtral"](), "gpus": "2x24GB", "prompt_tokens": 9, "new_tokens": 5}
    drawn = simulate.run(device_map, seed=2, weight_dtype="float32", **options)
    assert drawn == simulate.run(plan, seed=2) != simulate.run(plan)


def test_every_process_makes_the_same_timeline(tmp_path: Path) -> None:
    """Names of devices are hashed differently in each process."""
    device_map: dict[str, int | str] = {"": 0, "model.layers.0": 1, "model.layers.2": "cpu", "model.norm": 1}
    device_map |= {"model.layers.1": 1, "model.layers.1.mlp": "cpu"}
    plan = planned("llama", device_map)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (tmp_path / "map.json").write_text(json.dumps(device_map), encoding="utf-8")
    code = (
        "import json, pathlib, simulate; from planner.plan import Plan; "
        "plan = Plan.from_json(pathlib.Path('plan.json').read_text()); "
        "found = json.loads(pathlib.Path('map.json').read_text()); "
        "print([*map(repr, (simulate.run(plan), simulate.run(plan, seed=1), simulate.run_accelerate(plan, found)))])"
    )
    root = Path(planner.__file__).parents[1]
    told = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "77")
    }  # fmt: skip
    assert len(told) == 1
