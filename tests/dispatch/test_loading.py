"""Predicted peaks of loading against what `dispatch.apply` really holds. A GPU is played by the meta device: the same
code as for CUDA but for pinning and streams, and a memory of its own that is counted apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from load_meter import live_everywhere
from safetensors.torch import load_file, save_file

import dispatch
import planner
from dispatch.checkpoint import Checkpoint
from dispatch.sources import TensorSource
from dispatch.weights import Weights
from planner import loading
from planner.plan import Plan
from tiny_models import WORK, Case, streamed

BF16, F32 = torch.bfloat16, torch.float32


def plan_of(case: Case, **options: Any) -> Plan:
    """Return the plan for a checkpoint's folder: its headers are read."""
    dtype = str(case.dtype).removeprefix("torch.")
    return planner.plan_model(str(case.folder), weight_dtype=dtype, **WORK, **options)


def half_on_disk(case: Case) -> Plan:
    whole = plan_of(case, gpus=0)
    assert whole.prediction is not None
    cap = whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 2
    plan = plan_of(case, gpus=0, max_memory={"cpu": cap})
    assert any(p.home == "disk" for p in plan.placements)
    return plan


def make_plan(case: Case, mode: str) -> Plan:
    if mode == "cpu":
        return plan_of(case, gpus=0)
    if mode == "disk":
        return half_on_disk(case)
    one = plan_of(case, gpus="1x24GB")
    return one if mode == "gpu" else streamed(one, {"from host": "cpu", "from disk": "disk"}[mode])


def as_meta(plan: Plan) -> dict[str, str]:
    return {device.name: "meta" for device in plan.hardware.gpus}


def requested(plan: Plan) -> dict[str, int]:
    """Return the predicted bytes of "cpu" and "meta" as the program asks for them: nothing rounded, no context."""
    plain = [
        dataclasses.replace(device, kind="cpu", context_bytes=0, workspace_bytes=0) for device in plan.hardware.devices
    ]
    exact = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, devices=tuple(plain)))
    peaks = {name: usage.total for name, usage in loading.load_peak(exact).items()}
    return {"cpu": peaks["cpu"], "meta": sum(nbytes for name, nbytes in peaks.items() if name != "cpu")}


def held(model: Any, plan: Plan, *, loaded: bool = False, **options: Any) -> dict[str, int]:
    """Return the most bytes that `apply` held at once on the host and on the pretended GPUs."""
    with live_everywhere(model if loaded else None) as counts:
        dispatch.apply(model, plan, devices=as_meta(plan), **options)
    return {"cpu": counts.peak.get("cpu", 0), "meta": counts.peak.get("meta", 0)}


MODES = ["cpu", "gpu", "from host", "from disk", "disk"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "tied-llama", "mixtral", "qwen3-moe", "gpt2"])
def test_the_same_dtype(make_case: Any, name: str, mode: str) -> None:
    case = make_case(name, BF16 if name == "mixtral" else F32)
    plan = make_plan(case, mode)
    assert held(case.meta(), plan, checkpoint=case.folder) == requested(plan)


@pytest.mark.parametrize("mode", ["cpu", "gpu", "from host", "from disk"])
@pytest.mark.parametrize("name", ["tied-llama", "mixtral"])
@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32), (torch.float16, BF16)], ids=str)
def test_a_checkpoint_in_another_dtype(make_case: Any, name: str, mode: str, dtypes: tuple[Any, Any]) -> None:
    stored, wanted = dtypes
    case = dataclasses.replace(make_case(name, stored), dtype=wanted)
    plan = make_plan(case, mode)
    assert held(case.meta(), plan, checkpoint=case.folder) == requested(plan)


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_reads_behind_the_thread_that_launches(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, name: str, dtypes: tuple[Any, Any]
) -> None:
    """As for CUDA: no memory but the staging that is counted, and what is converted is so inside of it."""
    monkeypatch.setattr("dispatch.slots.reads_behind", lambda device: device.type != "cpu")
    stored, wanted = dtypes
    case = dataclasses.replace(make_case(name, stored), dtype=wanted)
    plan = make_plan(case, "from disk")
    model = case.meta()
    with live_everywhere() as counts:
        dispatch.apply(model, plan, checkpoint=case.folder, devices=as_meta(plan))
        (stream,) = model._loadplan_dispatch.streams
        stream.ring.close()
        loading_peak, counts.peak = counts.peak, dict(counts.live)
        for group in (*stream.groups, *stream.groups):
            stream.acquire(group)
            stream.release(group)
        stream.ring.close()
    assert {device: loading_peak[device] for device in ("cpu", "meta")} == requested(plan)
    assert counts.peak == counts.live, "nothing is taken in a call"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "tied-llama", "mixtral"])
def test_a_loaded_model(make_case: Any, tmp_path: Path, name: str, mode: str) -> None:
    """Its own memory counts until all is copied; what a GPU takes is told apart where its parameters stand in meta."""
    case = make_case(name)
    model = case.loaded()
    cap = {"cpu": plan_of(case, gpus=0).prediction.peak_bytes["cpu"] - 500_000}  # type: ignore[union-attr]
    options = {"gpus": 0, "max_memory": cap} if mode == "disk" else {"gpus": 0 if mode == "cpu" else "1x24GB"}
    plan = planner.plan_model(model, use_cache=False, **WORK, **options)
    plan = streamed(plan, {"from host": "cpu", "from disk": "disk"}[mode]) if mode.startswith("from") else plan
    assert plan.model.loaded
    most = held(model, plan, loaded=True, offload_dir=tmp_path / "offload")
    assert most["cpu"] == requested(plan)["cpu"]


def test_a_loaded_model_that_is_compared_with_its_checkpoint(make_case: Any) -> None:
    case = make_case("llama")
    model = case.loaded()
    plan = streamed(planner.plan_model(model, gpus="1x24GB", use_cache=False, **WORK), "disk")
    most = held(model, plan, loaded=True, checkpoint=case.folder)["cpu"]
    assert 0 <= most - requested(plan)["cpu"] <= loading.COMPARE_BYTES


def test_a_model_by_its_name(make_case: Any) -> None:
    case = make_case("mixtral", BF16)
    plan = plan_of(case, gpus=0)
    with live_everywhere() as counts:
        dispatch.apply(str(case.folder), plan)
    assert counts.peak["cpu"] == requested(plan)["cpu"] == plan.prediction.load_peak_bytes["cpu"]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["cpu", "gpu", "from host", "from disk"])
@pytest.mark.parametrize("stored", [F32, BF16], ids=str)
def test_many_reads_pass_through_small_buffers(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, mode: str, stored: torch.dtype
) -> None:
    """As large tensors pass through 8 MiB: no reader holds more than its buffer, whatever the others do."""
    monkeypatch.setattr(loading, "BUFFER_BYTES", 10_000)
    case = dataclasses.replace(make_case("mixtral", stored), dtype=BF16)
    plan = make_plan(case, mode)
    predicted = loading.load_peak(plan)["cpu"].workspace
    bounced = mode == "gpu" or mode.startswith("from") or stored != BF16
    assert predicted == (loading.READERS * 10_000 if bounced else 0)
    model = case.meta()
    assert held(model, plan, checkpoint=case.folder) == requested(plan)


@pytest.mark.parametrize("mode", ["cpu", "gpu"])
def test_experts_stored_fused(make_case: Any, tmp_path: Path, mode: str) -> None:
    case = make_case("mixtral", BF16)
    case.reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    case = dataclasses.replace(case, folder=tmp_path / "fused")
    for plan in (make_plan(case, mode), streamed(plan_of(case, gpus="1x24GB"), "cpu")):
        assert held(case.meta(), plan, checkpoint=case.folder) == requested(plan)


def test_tied_weights_that_the_checkpoint_holds_twice(make_case: Any) -> None:
    case = make_case("tied-llama")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(case.folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (case.folder / "model.safetensors.index.json").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, case.folder / "model.safetensors")
    plan = plan_of(case, gpus=0)
    assert held(case.meta(), plan, checkpoint=case.folder) == requested(plan)


# The tests above can fail


def less_staging(patch: pytest.MonkeyPatch) -> None:
    slots = loading._slots
    patch.setattr(loading, "_slots", lambda plan: (entry for entry in slots(plan) if entry[0] != "cpu"))


def half_the_buffer(patch: pytest.MonkeyPatch) -> None:
    whole = loading.buffer_bytes
    patch.setattr(loading, "buffer_bytes", lambda *args: whole(*args) // 2)


def ties_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dispatch.preparation.resident_ties", lambda graph, placements: {})


def a_slab_on_the_host(patch: pytest.MonkeyPatch) -> None:
    def slab(self: Weights, names: list[str], device: torch.device, *, expert: int | None = None) -> Any:
        store = self.store(names, on_disk=False, target=torch.device("cpu"), expert=expert)
        return store.layout.views(store.slab.to(device))  # type: ignore[attr-defined]

    patch.setattr(Weights, "slab", slab)


def buffers_of_their_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dispatch.buffers.Buffers.lend", lambda self: contextlib.nullcontext())


def fused_in_memory(patch: pytest.MonkeyPatch) -> None:
    """As transformers' loader stacks experts: in memory of their own, and then to their place."""
    fill = TensorSource.fill

    def twice(self: TensorSource, checkpoint: Any, destination: torch.Tensor, buffer: Any = None) -> None:
        whole = torch.empty(self.shape, dtype=self.dtype)
        fill(self, checkpoint, whole, buffer)
        destination.copy_(whole)

    patch.setattr(TensorSource, "fill", twice)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (less_staging, "llama", "from disk"),
    (half_the_buffer, "llama", "gpu"),
    (lambda patch: patch.setattr(loading, "READERS", 3), "llama", "gpu"),
    (lambda patch: patch.setattr("dispatch.preparation.READERS", 5), "llama", "gpu"),
    (ties_twice, "tied-llama", "cpu"),
    (a_slab_on_the_host, "llama", "gpu"),
    (buffers_of_their_own, "mixtral", "gpu"),
    (fused_in_memory, "mixtral", "cpu"),
]


@pytest.mark.parametrize(("fault", "name", "mode"), FAULTS)
def test_a_fault_is_found_out(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, fault: Any, name: str, mode: str
) -> None:
    case = make_case(name)
    plan = make_plan(case, mode)
    fault(monkeypatch)
    assert held(case.meta(), plan, checkpoint=case.folder) != requested(plan)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tied-llama", "mixtral"])
def test_the_bar_counts_every_byte_that_is_read_once(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, mode: str
) -> None:
    case = make_case(name, BF16)
    plan = make_plan(case, mode)
    told: list[tuple[int, list[int]]] = []

    @contextlib.contextmanager
    def bar(total_bytes: int, *, shown: bool | None) -> Any:
        told.append((total_bytes, []))
        yield told[-1][1].append

    with monkeypatch.context() as patch:
        patch.setattr("dispatch.dispatched.loading_bar", bar)
        dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=as_meta(plan))
    [(total, parts)] = told
    assert sum(parts) == total > 0
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=as_meta(plan))
    assert "Loading weights" not in capsys.readouterr().err, "no terminal, no bar"
    if mode in ("cpu", "disk"):
        dispatch.remove(model)
        dispatch.apply(case.meta(), plan, checkpoint=case.folder, progress=True)
        assert "Loading weights: 100%" in capsys.readouterr().err


def test_loading_reads_groups_in_the_order_of_the_files(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dispatch.preparation.READERS", 1)
    case = make_case("llama")
    places: dict[str, tuple[str, int]] = {}
    inner = TensorSource.fill

    def fill(self: TensorSource, *args: Any) -> None:
        entry = self.pieces[0].entry
        assert self.name not in places, "one pass"
        places[self.name] = (str(entry.file), entry.offset_bytes)
        inner(self, *args)

    monkeypatch.setattr(TensorSource, "fill", fill)
    dispatch.apply(case.meta(), plan_of(case, gpus=0), checkpoint=case.folder)
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, where in places.items():
        if "mlp" in name or "self_attn" in name:
            groups.setdefault(".".join(name.split(".")[:4]), []).append(where)
    assert len(groups) == 10
    for found in groups.values():
        assert found == sorted(found)
    starts = [found[0] for found in groups.values()]
    assert starts == sorted(starts)


def part_of(name: str) -> str:
    """Return the group, or the expert of one, that a stored tensor of Mixtral belongs to."""
    words = name.split(".")
    if "experts" in words:
        return ".".join(words[: words.index("experts") + 2])
    return ".".join(words[:4]) if "self_attn" in words else "rest of " + ".".join(words[:3])


def test_what_waits_in_memory_is_read_in_the_order_of_the_files(
    make_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts too, which lie in the files one by one; and each byte once."""
    monkeypatch.setattr("dispatch.preparation.READERS", 1)
    case = make_case("mixtral")
    plan = make_plan(case, "from host")
    read: list[tuple[str, int]] = []
    names: dict[tuple[str, int], str] = {}
    inner = Checkpoint.read_into

    def read_into(self: Checkpoint, entry: Any, destination: Any, *, start: int = 0, stop: int | None = None) -> None:
        read.append((str(entry.file), entry.offset_bytes + start))
        names[read[-1]] = part_of(entry.name)
        inner(self, entry, destination, start=start, stop=stop)

    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=as_meta(plan))
    assert len(read) == len(set(read)) == len(Checkpoint.open(case.folder))
    first: dict[str, tuple[str, int]] = {}
    for where in sorted(names):
        first.setdefault(names[where], where)
    reached = [part for part in dict.fromkeys(names[where] for where in read) if not part.startswith("rest")]
    assert len(reached) == 3 * (8 + 1)
    assert [first[part] for part in reached] == sorted(first[part] for part in reached)


def test_what_waits_in_memory_is_read_by_all_readers_at_once(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mixtral")
    plan = make_plan(case, "from host")
    together = threading.Barrier(loading.READERS)
    inner = Weights.store

    def store(self: Weights, *args: Any, **kwargs: Any) -> Any:
        if not met:
            together.wait(timeout=20)
            met.append(True)
        return inner(self, *args, **kwargs)

    met: list[bool] = []
    monkeypatch.setattr(Weights, "store", store)
    dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=as_meta(plan))
    assert met
