"""Accelerate's functions on models of transformers: checkpoints that need conversion, generation, threads, devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dispatch
import simulate
from simulate.virtual_machine import Machine

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**7, "cuda:1": 10**7}) as made:
        yield made


@pytest.mark.parametrize(("name", "home"), [("tied-llama", "disk"), ("mixtral", "cpu")])
def test_a_checkpoint_streamed_by_a_map(name: str, home: str, make_case: Any, tmp_path: Path) -> None:
    case = make_case(name)
    model = dispatch.load_checkpoint_and_dispatch(
        case.meta(), case.folder, {"": home, "model.norm": 0}, offload_folder=tmp_path / "offload", devices=PLAYED
    )
    assert torch.equal(case.logits(model), case.logits(case.reference))
    assert torch.equal(case.generate(model), case.generate(case.reference))
    # All that waits is used from the checkpoint's files, but for experts, which are put together anew each time.
    assert not (tmp_path / "offload").exists()


def test_generation_over_two_devices_that_do_not_mix(make_case: Any, box: Machine) -> None:
    case = make_case("llama")
    one, other = box.devices["cuda:0"], box.devices["cuda:1"]
    places: dict[str, Any] = {"model.embed_tokens": one, "model.norm": other, "lm_head": other, "model.rotary_emb": one}
    places |= {f"model.layers.{index}": (one, "cpu", "disk", other, other)[index] for index in range(5)}
    model = dispatch.load_checkpoint_and_dispatch(case.meta(), case.folder, places)
    torch.testing.assert_close(case.logits(model), case.logits(case.reference), rtol=1e-4, atol=1e-5)
    assert model.device == one


def test_threads_take_turns(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.cpu_offload(case.loaded(), 0, devices=PLAYED)
    expected, found = case.logits(case.reference), []
    threads = [threading.Thread(target=lambda: found.append(case.logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize(
    ("choice", "shares"),
    [("sequential", (1.0, 1.0)), ("auto", (0.3, 0.7)), ("balanced", (0.3, 0.7)), ("balanced_low_0", (0.0, 0.3))],
)
def test_maps_by_name_are_the_planners(choice: str, shares: tuple[float, float], make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.load_checkpoint_and_dispatch(
        case.meta(), case.folder, choice, max_memory={0: "2MB", 1: "2MB"},
        no_split_module_classes=["LlamaDecoderLayer"], devices={"cuda:0": "cpu", "cuda:1": "cpu"},
    )  # fmt: skip
    places: Any = model.hf_device_map
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    on_first = sum(
        nbytes for name, nbytes in sizes.items() if places[max((k for k in places if is_in(name, k)), key=len)] == 0
    )
    # Two alike GPUs that each could hold it all: in a row, in halves, or as little as can be on the first.
    assert shares[0] <= on_first / sum(sizes.values()) <= shares[1]
    assert torch.equal(case.logits(model), case.logits(case.reference))


def test_a_map_by_name_uses_memory_and_disk_where_gpus_are_small(make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    model = dispatch.load_checkpoint_and_dispatch(
        case.meta(), case.folder, "auto", max_memory={0: "500KB", "cpu": "500KB"},
        no_split_module_classes=["LlamaDecoderLayer"], offload_folder=tmp_path / "offload", devices=PLAYED,
    )  # fmt: skip
    places: Any = model.hf_device_map
    assert set(places.values()) == {0, "cpu", "disk"}
    assert torch.equal(case.generate(model), case.generate(case.reference))


def is_in(name: str, key: str) -> bool:
    return key == "" or name.startswith(f"{key}.")
