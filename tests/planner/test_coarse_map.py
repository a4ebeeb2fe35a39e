"""A plan as a device map: run by Accelerate on pretend GPUs that enforce its capacities, and by from_pretrained."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from accelerate.utils import modeling
from tight_cases import generate, plain, prompt, reference, settings
from transformers.utils import logging

import planner
import simulate
from module_trees import place_of
from planner.accelerate_map import quiet
from planner.coarse_map import CoarseMap
from planner.errors import InputError
from planner.given import build_on_meta, describe
from planner.plan import Plan
from simulate.timeline import MemorySample
from simulate.virtual_machine import Machine
from tiny_models import CONFIGS, Case, build_case


@functools.cache
def planned(name: str, gpus: str, ram: str = "128GB") -> Plan:
    return planner.plan_model(name, gpus=gpus, ram=ram)


@pytest.fixture
def parameters_of_virtual_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate makes parameters anew as instances of their class, which is Parameter on real devices alone."""

    def class_of(value: Any, *rest: Any) -> Any:
        return torch.nn.Parameter if isinstance(value, torch.Tensor) else type(value, *rest)

    monkeypatch.setattr(modeling, "type", class_of, raising=False)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with quiet():
        yield


@pytest.mark.usefixtures("one_thread", "parameters_of_virtual_devices")
@pytest.mark.parametrize(("name", "runs"), [("gpt2", 6), ("mixtral", 4)])
def test_accelerate_runs_it_within_the_plans_own_capacities(name: str, runs: int) -> None:
    ran = 0
    for setting in settings(name):
        found = setting.plan.device_map()
        experts = setting.plan.execution.experts
        numbers = [place for place in found.values() if isinstance(place, int)]
        if not numbers:
            assert any(text.startswith("GPUs: ") for text in found.lost)
            continue
        model = reference(name, experts)
        inputs = 2 * prompt().numel() * 8
        capacities = {f"cuda:{index}": setting.room_bytes + inputs for index in range(setting.gpus)}
        with Machine(capacities) as box:
            names: dict[Any, str] = {index: str(device) for index, device in enumerate(box.devices.values())}
            places = {key: names.get(place, str(place)) for key, place in found.items()}
            main = names[min(numbers)]
            model = dispatch_model(model, places, main_device=main, force_hooks=True)
            tokens, _ = generate(model, prompt().to(main))
        assert torch.equal(tokens, plain(name, experts)[0])
        ran += 1
    # Two GPUs that take one expert at a time have no room for all of a layer's.
    assert ran == runs


def total(sample: MemorySample) -> int:
    return sample.weights + sample.kv_cache + sample.activations + sample.slots + sample.workspace + sample.context


@pytest.mark.parametrize(
    ("name", "gpus", "ram"),
    [
        ("meta-llama/Llama-3-8B", "12GB", "128GB"),
        ("meta-llama/Llama-3-8B", "2x8GB", "128GB"),
        ("mistralai/Mixtral-8x7B", "2x24GB", "128GB"),
        ("mistralai/Mixtral-8x7B", "24GB", "40GB"),
        ("meta-llama/Llama-3.2-1B", "2GB", "128GB"),
    ],
)
def test_simulated_hooks_take_no_more_than_the_capacities(name: str, gpus: str, ram: str) -> None:
    plan = planned(name, gpus, ram)
    found = plan.device_map()
    for sample in simulate.run_accelerate(plan, found).memory:
        assert total(sample) <= plan.hardware.pool(sample.device).usable_bytes, sample
    model = build_on_meta(describe(name), "bfloat16")
    planner.check_device_map(model, found)
    modeling.check_device_map(model, found)
    assert plan.device_map() == found
    assert json.loads(json.dumps(found)) == found


def test_a_map_of_what_is_resident_loses_nothing() -> None:
    found = planned("gpt2", "2GB").device_map()
    assert found == {"": 0}
    assert found.lost == ()


def test_it_is_told_what_is_lost() -> None:
    lost = [text.partition(":")[0] for text in planned("mistralai/Mixtral-8x7B", "2x24GB").device_map().lost]
    assert {"partial residency", "routing", "experts on the CPU", "prefetch", "pinned memory", "experts"} <= set(lost)
    plan = planned("meta-llama/Llama-3-8B", "12GB")
    lower = dataclasses.replace(
        plan, placements=tuple(dataclasses.replace(entry, dtype="int8") for entry in plan.placements)
    )
    assert any(text.startswith("precision: ") for text in lower.device_map().lost)
    assert not any(text.startswith("precision: ") for text in plan.device_map().lost)
    on_cpu = {entry.layer for entry in plan.placements if entry.run_on == "cpu"}
    assert f"layers on the CPU: {len(on_cpu)}; here their weights are brought to cuda:0" in plan.device_map().lost


def test_a_layer_on_another_gpu_is_whole_and_a_split_one_is_given_what_is_on_the_first() -> None:
    plan = planned("meta-llama/Llama-3-8B", "2x8GB")
    found = plan.device_map()
    names = [layer.name for layer in plan.graph.layers]
    places = {
        name: {place_of(full, found) for index, _, full, _ in plan.graph.tensors() if names[index] == name}
        for name in names
    }
    split = [name for name, there in places.items() if len(there) > 1]
    assert split
    for edge in plan.graph.edges:
        if names[edge.target] in split:
            assert 1 not in places[names[edge.source]]
    assert not any(1 in places[name] for name in split)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.usefixtures("one_thread")
def test_from_pretrained_takes_it(llama: Case, tmp_path: Path) -> None:
    plan = planner.plan_model(str(llama.folder), gpus=0, prompt_tokens=13, new_tokens=6, batch_size=2,
                              max_memory={"cpu": "700kB"})  # fmt: skip
    found = plan.device_map()
    assert set(found.values()) == {"cpu", "disk"}
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            llama.folder, device_map=found, offload_folder=tmp_path, dtype=torch.float32
        ).eval()
    assert model.hf_device_map == found
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(llama.logits(model), llama.logits(llama.reference))


def test_the_map_of_a_plan_that_a_map_made_is_that_map(llama: Case) -> None:
    given: dict[str, int | str] = {"": 0, "model.layers.1": 1, "model.layers.3": "cpu", "lm_head": 1}
    plan = planner.plan_from_device_map(CONFIGS["llama"](), given, gpus="2x24GB", weight_dtype="float32")
    found = plan.device_map()
    for _, _, name, _ in plan.graph.tensors():
        where = place_of(name, found)
        # What waited has room beside the rest, and is kept.
        assert where == (0 if name.startswith("model.layers.3.") else place_of(name, given))


def test_what_no_map_can_hold_is_refused() -> None:
    plan = planned("gpt2", "2GB")
    two = planner.plan_model("gpt2", gpus="1x24GB/1x24GB")
    with pytest.raises(InputError, match="several nodes"):
        two.device_map()
    small = tuple(dataclasses.replace(pool, capacity_bytes=10**6) for pool in plan.hardware.pools)
    tight = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, pools=small))
    with pytest.raises(InputError, match="no device map of this plan fits"):
        tight.device_map()


def test_it_is_a_plain_dict_with_words() -> None:
    found = CoarseMap({"": 0}, ["prefetch: none"])
    assert isinstance(found, dict)
    assert (found, found.lost) == ({"": 0}, ("prefetch: none",))


PAGE = Path(__file__).parents[2] / "docs" / "familiar-planning.md"


def test_the_pages_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "prefetch: " in capsys.readouterr().out
    assert names["plan"].device_map() == names["device_map"]
