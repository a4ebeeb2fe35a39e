"""What the headers of a checkpoint say, and what a plan makes of it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import planner
from planner import headers, loading, memory
from planner.errors import InputError
from planner.headers import find_headers, hub_headers, not_fetched, read_headers
from planner.models import ModelSource
from planner.plan import Plan
from planner.stored import compare

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
WORK = {"batch_size": 1, "prompt_tokens": 9, "new_tokens": 3}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).save_pretrained(folder, **options)
    return folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Rewrite a checkpoint of one file with other tensors."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def reconfigured(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def plan_of(folder: Path, **options: Any) -> Plan:
    return planner.plan_model(str(folder), **{"gpus": 0, **WORK, **options})


def notes_of(folder: Path, **options: Any) -> str:
    return "\n".join(plan_of(folder, **options).assumptions)


def files_bytes(folder: Path) -> int:
    """Return the bytes of data in the files, as safetensors itself reads them."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (no dict)
    return total


@pytest.mark.parametrize("size", ["40KB", "1GB"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_headers_are_what_safetensors_reads(name: str, size: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path, max_shard_size=size)
    found = read_headers(folder)
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            told = found.tensors[key]
            assert (told.file, told.shape, told.nbytes) == (path, tuple(tensor.shape), tensor.nbytes)
            assert headers.DTYPES[told.dtype] == (str(tensor.dtype).removeprefix("torch."), tensor.dtype.itemsize)
            assert path.read_bytes()[told.offset_bytes :][: told.nbytes] == tensor.view(torch.uint8).numpy().tobytes()
    assert found.total_bytes == files_bytes(folder)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_every_stored_byte_belongs_to_a_tensor_of_the_graph(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    folder = save(name, tmp_path, stored, max_shard_size="60KB")
    graph = plan_of(folder, weight_dtype="bf16").graph
    tied = graph.tied_to_earlier()
    assert sum(t.stored_bytes for _, _, n, t in graph.tensors() if n not in tied) == files_bytes(folder)
    for _, _, _, tensor in graph.tensors():
        assert tensor.stored is not None
        assert tensor.is_converted == (stored == torch.float32)
        assert tensor.stored.nbytes == tensor.nbytes * stored.itemsize // 2
    plan = plan_of(folder, weight_dtype="bf16")
    assert plan.model.stored_bytes == files_bytes(folder)
    assert loading.read_bytes(plan) == files_bytes(folder)


# The dtype that a plan runs in


def test_the_users_dtype_then_the_headers_then_the_configs(tmp_path: Path) -> None:
    folder = reconfigured(save("llama", tmp_path, torch.bfloat16), dtype="float32")
    assert plan_of(folder).model.weight_dtype == "bfloat16"
    assert "weights in bfloat16 (as the checkpoint stores them; its config says float32)" in notes_of(folder)
    assert plan_of(folder, weight_dtype="fp16").model.weight_dtype == "float16"
    assert "weights are stored in bfloat16 and become float16 while loading" in notes_of(folder, weight_dtype="fp16")
    (folder / "model.safetensors").unlink()
    assert plan_of(folder).model.weight_dtype == "float32"
    assert "weights in float32 (as the config says)" in notes_of(folder)
    assert "sizes are what the config says: no safetensors files are there" in notes_of(folder)


def test_a_checkpoint_in_accord_with_its_config_is_said_to_be(tmp_path: Path) -> None:
    plan = plan_of(save("mixtral", tmp_path))
    told = [note for note in plan.assumptions if "header" in note]
    assert told == [
        "the checkpoint's headers: 41 tensors, 427.6 kB on disk (427.6 kB bfloat16); in memory 427.6 kB, in bfloat16"
    ]
    assert not [note for note in plan.assumptions if "CHECKPOINT" in note]


# Where the two disagree


def test_mixed_dtypes_are_named(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    router = "model.layers.{}.block_sparse_moe.gate.weight"
    changed(folder, lambda t: t | {router.format(i): t[router.format(i)].float() for i in range(2)})
    plan = plan_of(folder)
    note = next(note for note in plan.assumptions if "stored in float32" in note)
    assert note.startswith("2 tensors (2.05 kB) stored in float32, not in bfloat16: model.layers.0.block_sparse_moe")
    assert note.endswith("; converted to bfloat16 while loading")
    converted = {name for _, _, name, tensor in plan.graph.tensors() if tensor.is_converted}
    assert converted == {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}


def test_layers_that_are_stored_differently_are_kinds_of_their_own(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda t: t | {name: t[name].float()})
    graph = plan_of(folder).graph
    blocks = [graph.kind_of(i) for i, layer in enumerate(graph.layers) if "layers." in layer.name]
    assert blocks[0].name == blocks[1].name
    assert blocks[0] != blocks[1]
    assert planner.verify_plan(plan_of(folder)) == ()


def test_missing_and_unexpected_tensors_are_counted(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    changed(folder, lambda t: {n: v for n, v in t.items() if "layers.1.mlp" not in n} | {"extra.x": torch.ones(3)})
    notes = notes_of(folder)
    assert "THE CHECKPOINT LACKS 3 of the 21 tensors that the config describes: model.layers.1.mlp." in notes
    assert "the checkpoint has 1 tensor (12 B) beyond what the config describes, not loaded: extra.x" in notes


def test_other_shapes_are_named(tmp_path: Path) -> None:
    folder = reconfigured(save("llama", tmp_path), intermediate_size=80)
    notes = notes_of(folder)
    assert "THE CHECKPOINT IS NOT OF THIS CONFIG: 6 tensors of another shape" in notes
    assert "(64, 96) in the checkpoint and (64, 80) by the config" in notes
    folder = reconfigured(save("mixtral", tmp_path / "moe"), num_local_experts=3)
    assert "(3, 192, 64) by the config" in notes_of(folder)


def test_experts_stored_fused_and_apart_say_the_same(tmp_path: Path) -> None:
    apart = plan_of(save("mixtral", tmp_path / "apart"))
    fused = plan_of(save("mixtral", tmp_path / "fused", save_original_format=False))
    assert apart.model.stored_bytes == fused.model.stored_bytes
    for (_, _, name, one), (_, _, other_name, other) in zip(apart.graph.tensors(), fused.graph.tensors(), strict=True):
        assert name == other_name
        assert one.stored_bytes == other.stored_bytes == one.nbytes


# Quantised checkpoints


def fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if "proj" in name:
            made[name] = tensor.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.ones(1, 1)
    return made


def fp8_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DeepSeek and others store them: a scale beside each expert's weight."""
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if ".experts." in name:
            made[name] = tensor.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.ones(1, 1)
    return made


def gptq(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            made[name] = tensor.half()
            continue
        stem = name.removesuffix("weight")
        out, into = tensor.shape
        made[f"{stem}qweight"] = torch.zeros(into // 8, out, dtype=torch.int32)
        made[f"{stem}qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
        made[f"{stem}scales"] = torch.ones(1, out, dtype=torch.float16)
    return made


def int8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.int8) if "proj" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change", "dtype"),
    [
        ("llama", fp8, "bfloat16"),
        ("llama", gptq, "float16"),
        ("llama", int8, "bfloat16"),
        ("mixtral", fp8_experts, "bfloat16"),
    ],
)
def test_quantised_bytes_are_those_of_the_files(name: str, change: Any, dtype: str, tmp_path: Path) -> None:
    folder = reconfigured(save(name, tmp_path), quantization_config={"quant_method": change.__name__})
    changed(folder, change)
    plan = plan_of(folder)
    assert plan.model.weight_dtype == dtype, "the float that most bytes are in"
    assert plan.model.stored_bytes == files_bytes(folder)
    assert sum(tensor.stored_bytes for _, _, _, tensor in plan.graph.tensors()) == files_bytes(folder)
    assert loading.read_bytes(plan) == files_bytes(folder) < plan.model.weight_bytes
    notes = "\n".join(plan.assumptions)
    assert f"THE CHECKPOINT IS QUANTISED: {4 if name == 'mixtral' else 14} weights take" in notes
    assert "dispatch does not load quantised weights yet" in notes
    assert "LACKS" not in notes
    assert "beyond what" not in notes


def test_blobs_of_fused_experts_count_to_their_group(tmp_path: Path) -> None:
    """As gpt-oss stores them: blocks and scales beside where the model has one parameter."""
    folder = save("mixtral", tmp_path, save_original_format=False)

    def blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if ".experts." in name:
                made[f"{name}_blocks"] = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] // 2, dtype=torch.uint8)
                made[f"{name}_scales"] = torch.zeros(*tensor.shape[:-1], 2, dtype=torch.uint8)
            else:
                made[name] = tensor
        return made

    changed(folder, blocks)
    plan = plan_of(folder)
    group = next(group for kind in plan.graph.kinds for group in kind.groups if group.slices > 1)
    assert sum(tensor.stored_bytes for tensor in group.tensors if tensor.stored) == 4 * (64 * 96 * 3 // 2 + 256 * 2)
    assert "QUANTISED" in "\n".join(plan.assumptions)


def test_a_config_alone_that_says_quantised(tmp_path: Path) -> None:
    folder = reconfigured(save("llama", tmp_path), quantization_config={"quant_method": "fp8"})
    (folder / "model.safetensors").unlink()
    assert "the published weights are quantised (fp8): the plan is for weights in bfloat16" in notes_of(folder)


# Sizes on disk, and the time of loading


def test_the_disk_and_loading_count_stored_bytes(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path, torch.float32)
    whole = plan_of(folder, weight_dtype="bf16")
    assert whole.prediction is not None
    rate = whole.hardware.link("disk", "cpu").bytes_per_s
    assert whole.prediction.load_ns == files_bytes(folder) * 10**9 // rate
    cap = whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 4
    plan = plan_of(folder, weight_dtype="bf16", max_memory={"cpu": cap})
    assert planner.verify_plan(plan) == ()
    assert plan.prediction is not None
    waiting = [(p, g, memory.waiting_slices(p, g)) for p, g in memory.with_groups(plan.graph, plan.placements)]
    on_disk = sum(g.slice_stored_bytes * n for p, g, n in waiting if p.home == "disk")
    in_memory = sum(g.slice_slab_bytes * n for p, g, n in waiting if p.home == "disk")
    assert plan.prediction.peak_bytes["disk"] == on_disk == 2 * in_memory > 0
    assert plan.prediction.load_ns == (files_bytes(folder) - on_disk) * 10**9 // rate


def test_what_is_converted_is_not_used_from_the_file(tmp_path: Path) -> None:
    """Dispatch maps whole groups for the CPU as they are stored, so a plan leaves no others there."""
    folder = save("llama", tmp_path, torch.float32)
    whole = plan_of(folder)
    assert whole.prediction is not None
    cap = {"cpu": whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 4}
    assert any(p.home == "disk" for p in plan_of(folder, max_memory=cap).placements)
    half = plan_of(folder, weight_dtype="bf16")
    assert half.prediction is not None
    less = half.prediction.peak_bytes["cpu"] - half.model.weight_bytes // 4
    with pytest.raises(planner.InfeasibleError, match=r"or the dtype that the weights are stored in \(float32\)"):
        plan_of(folder, weight_dtype="bf16", max_memory={"cpu": less})


def test_a_plan_with_headers_survives_its_file(tmp_path: Path) -> None:
    plan = plan_of(save("mixtral", tmp_path, torch.float32), weight_dtype="bf16")
    assert Plan.from_json(plan.to_json()) == plan
    assert planner.verify_plan(plan) == ()


# Files that are not there, or lie


def test_weights_that_were_not_fetched_are_no_fault(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    assert not_fetched(folder) is None
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "model.safetensors is a Git LFS pointer" in notes_of(folder)


@pytest.mark.parametrize("fault", ["truncated", "header", "missing shard", "two indexes"])
def test_a_damaged_checkpoint_is_refused_when_it_is_planned(fault: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    if fault == "truncated":
        shard.write_bytes(content[:-1])
    elif fault == "header":
        shard.write_bytes(bytes(8) + content[8:])
    elif fault == "missing shard":
        shard.unlink()
    else:
        (folder / "model.safetensors.index.json").unlink()
        for name in "ab":
            (folder / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="several indexes" if fault == "two indexes" else shard.name):
        plan_of(folder)


# The Hub


def repository(files: dict[str, dict[str, tuple[str, list[int], list[int]]]]) -> Any:
    """Return what huggingface_hub.get_safetensors_metadata would."""
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    parsed = {
        file: SafetensorsFileMetadata(
            metadata={},
            tensors={n: TensorInfo(dtype=d, shape=s, data_offsets=(o[0], o[1])) for n, (d, s, o) in tensors.items()},
        )
        for file, tensors in files.items()
    }
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    return SafetensorsRepoMetadata(metadata=None, sharded=len(files) > 1, weight_map=weight_map, files_metadata=parsed)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A Hub with one repository: `hub.repository`, or an exception in its place."""
    state = types.SimpleNamespace(repository=None)

    def answer(name: str, *, revision: str | None = None) -> Any:
        if isinstance(state.repository, Exception):
            raise state.repository
        return state.repository

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", answer)
    return state


def test_headers_of_the_hub(hub: types.SimpleNamespace) -> None:
    hub.repository = repository(
        {
            "model-1.safetensors": {"b": ("F8_E4M3", [4], [8, 12]), "a": ("F32", [2], [0, 8])},
            "model-2.safetensors": {"c": ("BF16", [3, 2], [0, 12])},
        }
    )
    found = hub_headers("some/model", "main")
    assert not isinstance(found, str)
    assert found.bytes_by_dtype() == {"BF16": 12, "F32": 8, "F8_E4M3": 4}
    assert found.float_dtype() == "bfloat16"
    assert [(t.name, t.file.name, t.shape, t.nbytes) for t in found.tensors.values()] == [
        ("a", "model-1.safetensors", (2,), 8), ("b", "model-1.safetensors", (4,), 4),
        ("c", "model-2.safetensors", (3, 2), 12),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "overlaps"),
        ({"a": ("F32", [2], [8, 16])}, "leaves a gap"),
        ({"a": ("F31", [2], [0, 8])}, "dtype 'F31'"),
        ({"a": ("F32", [3], [0, 8])}, "needs 12"),
        ({"a": ("F32", [-2], [0, 8])}, "shape"),
        ({"a": ("F32", [2], [8, 0])}, "offsets"),
    ],
)
def test_headers_of_the_hub_that_lie(hub: types.SimpleNamespace, tensors: Any, match: str) -> None:
    hub.repository = repository({"model.safetensors": tensors})
    with pytest.raises(InputError, match=match):
        hub_headers("some/model", None)


def test_a_plan_from_the_hub_says_what_its_headers_do(
    hub: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reconfigured(save("llama", tmp_path), dtype="float32")
    files: dict[str, Any] = {"model.safetensors": {}}
    start = min(tensor.offset_bytes for tensor in read_headers(folder).tensors.values())
    for tensor in read_headers(folder).tensors.values():
        begin = tensor.offset_bytes - start
        files["model.safetensors"][tensor.name] = (tensor.dtype, list(tensor.shape), [begin, begin + tensor.nbytes])
    config = json.loads((folder / "config.json").read_text())
    source = ModelSource(
        id="some/model", source="hub", revision="0" * 40, config=config, config_digest="d", folder=None, note="",
    )  # fmt: skip
    monkeypatch.setattr("planner.given.resolve_model", lambda name, **options: source)
    hub.repository = repository(files)
    plan = planner.plan_model("some/model", gpus=0, hub=True, **WORK)
    assert plan.model.weight_dtype == "bfloat16"
    assert plan.model.stored_bytes == files_bytes(folder)
    hub.repository = ConnectionError("no route to host")
    plan = planner.plan_model("some/model", gpus=0, hub=True, **WORK)
    assert plan.model.weight_dtype == "float32"
    assert plan.model.stored_bytes is None
    assert any("could not be fetched from the Hub (no route to host)" in note for note in plan.assumptions)


def test_nothing_is_asked_of_models_without_a_checkpoint() -> None:
    notes: list[str] = []
    assert find_headers(folder=None, hub=False, name="gpt2", revision=None, notes=notes) is None
    assert notes == []


def test_comparing_needs_no_weights(tmp_path: Path) -> None:
    folder = save("tied", tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["tied"](), dtype=torch.bfloat16)
    found = compare(model, read_headers(folder), "bfloat16")
    assert found.stored["lm_head.weight"] == found.stored["model.embed_tokens.weight"]


# Loading against what there is


def test_a_plan_says_that_loading_does_not_fit() -> None:
    """A loaded model and what is copied out of it are both in memory, more than running takes."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    plan = planner.plan_model(model, gpus="1x24GB", max_memory={"cpu": "100kB"}, use_cache=False, **WORK)
    assert plan.prediction is not None
    assert plan.prediction.load_peak_bytes["cpu"] > 100_000 > plan.prediction.peak_bytes["cpu"]
    note = next(note for note in plan.assumptions if note.startswith("LOADING DOES NOT FIT"))
    assert "dispatch a model on meta" in note
    roomy = planner.plan_model(model, gpus="1x24GB", use_cache=False, **WORK)
    assert not [note for note in roomy.assumptions if "LOADING" in note]


def test_a_prediction_of_loading_that_was_changed_is_found() -> None:
    import dataclasses

    plan = planner.plan_model(CONFIGS["llama"](), gpus=0, **WORK)
    assert plan.prediction is not None
    less = dataclasses.replace(plan.prediction, load_peak_bytes={"cpu": plan.prediction.load_peak_bytes["cpu"] - 1})
    (violation,) = planner.verify_plan(dataclasses.replace(plan, prediction=less))
    assert "predicted peak while loading" in violation.message


def test_loading_takes_no_more_of_a_gpu_than_running() -> None:
    for model in ("gpt2", "mistralai/Mixtral-8x7B"):
        plan = planner.plan_model(model, gpus="2x24GB")
        assert plan.prediction is not None
        for gpu in plan.hardware.gpus:
            assert plan.prediction.load_peak_bytes[gpu.name] <= plan.prediction.peak_bytes[gpu.name]
