"""Checkpoints read into modules and straight to where a device map has each weight; and what is wrong with some."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, ZOO, Convolved, Rooted, Shuffled, rows, tensors_in
from safetensors.torch import save_file
from torch import nn

import dispatch
import planner
from planner.errors import InputError, PlanError, PlanMismatchError

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = ("file", "folder", "shards", "index", "bin", "bin folder", "bin shards")
MAP = {"": "cpu", "layers.0": 0, "layers.1": "disk", "layers.2": "disk"}
# Accelerate does not load beside "" what is on disk.
NAMED = {f"layers.{index}": "disk" if index in (1, 2) else "cpu" for index in range(6)}


def write(state: dict[str, torch.Tensor], folder: Path, kind: str) -> Path:
    """Write a checkpoint of one kind, and return its path."""
    folder.mkdir()
    names = sorted(state)
    parts = [names[::2], names[1::2]]
    if kind in ("file", "folder"):
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors" if kind == "file" else folder
    if kind in ("bin", "bin folder"):
        torch.save(state, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin" if kind == "bin" else folder
    ending = "bin" if kind == "bin shards" else "safetensors"
    files = [f"part-{number}.{ending}" for number in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        held = {name: state[name] for name in part}
        if ending == "bin":
            torch.save(held, folder / file)
        else:
            save_file(held, folder / file)
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part}}))
    return index if kind == "index" else folder


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def answer(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return tensors_in(model(rows() if x is None else x))[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_checkpoint(kind: str, tmp_path: Path) -> None:
    reference = ZOO["shuffled"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", kind)
    before = {file: file.read_bytes() for file in (tmp_path / "checkpoint").iterdir()}
    model = dispatch.load_checkpoint_and_dispatch(
        empty(Shuffled), path, MAP, offload_folder=tmp_path / "offload", devices=PLAYED
    )
    for _ in range(2):
        assert torch.equal(answer(model), answer(reference))
    # What safetensors files hold is not written again.
    assert (tmp_path / "offload").exists() is kind.startswith("bin")
    dispatch.remove_hook_from_submodules(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))

    for given in (empty(Shuffled), Shuffled().eval()):
        dispatch.load_checkpoint_in_model(given, path, strict=True)
        assert torch.equal(answer(given), answer(reference))
        assert all(parameter.requires_grad for parameter in given.parameters())
    assert {file: file.read_bytes() for file in (tmp_path / "checkpoint").iterdir()} == before


@pytest.mark.parametrize("kind", ["shards", "bin"])
def test_loading_and_dispatching_one_after_the_other(kind: str, tmp_path: Path) -> None:
    reference = ZOO["shuffled"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", kind)
    for run_on in ("cpu", 0):
        model = empty(Shuffled)
        places = {**MAP, "layers.0": run_on}
        folder = tmp_path / f"offload {run_on}"
        with pytest.raises(InputError, match="offload_folder"):
            dispatch.load_checkpoint_in_model(model, path, places, devices=PLAYED if run_on == 0 else None)
        assert all(parameter.is_meta for parameter in model.parameters())
        dispatch.load_checkpoint_in_model(model, path, places, folder, devices=PLAYED if run_on == 0 else None)
        away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        assert away == {f"layers.{index}.{leaf}" for index in (1, 2) for leaf in ("weight", "bias")}
        dispatch.dispatch_model(model, places, offload_dir=folder, devices=PLAYED if run_on == 0 else None)
        assert torch.equal(answer(model), answer(reference))


def test_accelerate_runs_the_folder_that_loading_leaves(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    reference = ZOO["shuffled"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", "shards")
    model, places = empty(Shuffled), NAMED
    dispatch.load_checkpoint_in_model(model, path, places, tmp_path / "offload")
    accelerate.dispatch_model(model, places, offload_dir=tmp_path / "offload")
    assert torch.equal(answer(model), answer(reference))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("main", [0, "cpu"])
def test_another_dtype(home: str, main: int | str, tmp_path: Path) -> None:
    reference = ZOO["convolved"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", "folder")
    reference.to(torch.bfloat16)
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        shutil.rmtree(tmp_path / "offload", ignore_errors=True)
        model = dispatch.load_checkpoint_and_dispatch(
            Convolved().eval(), path, {"": home, "head": main}, dtype=dtype, offload_folder=tmp_path / "offload",
            devices=PLAYED if main == 0 else None,
        )  # fmt: skip
        # Whole numbers are left as they are, and BatchNorm's statistics come from the checkpoint.
        assert torch.equal(answer(model, rows().bfloat16()), answer(reference, rows().bfloat16()))
        # What no file holds in this dtype is written where the CPU computes from a mapped file, and nowhere else.
        assert (tmp_path / "offload").exists() is ((home, main) == ("disk", "cpu"))
    dispatch.remove_hook_from_submodules(model)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.int64}


def test_some_modules_stay_in_float32(tmp_path: Path) -> None:
    reference = ZOO["shuffled"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", "folder")
    for dtype in (torch.float16, torch.bfloat16):
        model = empty(Shuffled)
        dispatch.load_checkpoint_in_model(model, path, dtype=dtype, keep_in_fp32_modules=["1", "layers.4", "ayers.2"])
        kept = {name.split(".")[1] for name, p in model.named_parameters() if p.dtype == torch.float32}
        assert kept == {"1", "4"}


def test_a_model_on_meta_is_read_to_where_it_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that waits on disk is read before it is used, and tied weights are read once."""
    reference = ZOO["tied"].build()
    held = ("embed.weight", "body.weight", "body.bias")
    state = {name: tensor for name, tensor in reference.state_dict().items() if name in held}
    path = write(state, tmp_path / "checkpoint", "file")
    read = []
    before = dispatch.Checkpoint.read_into
    monkeypatch.setattr(
        dispatch.Checkpoint, "read_into",
        lambda self, entry, *args, **kwargs: (read.append(entry.name), before(self, entry, *args, **kwargs))[1],
    )  # fmt: skip
    model = dispatch.load_checkpoint_and_dispatch(
        empty(type(reference)), path, {"": "disk", "embed": "cpu", "head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert read == ["embed.weight"]
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    ids = torch.tensor([[1, 4, 10]])
    with torch.no_grad():
        assert torch.equal(model(ids).out, reference(ids).out)
    assert not (tmp_path / "offload").exists()


# Keys


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    reference = ZOO["shuffled"].build()
    state = reference.state_dict()
    del state["layers.5.bias"]
    state["extra"] = torch.ones(2)
    for kind in ("folder", "bin"):
        path = write(state, tmp_path / kind, kind)
        model = Shuffled().eval()
        kept = model.layers[5].bias
        before = dict(model.named_parameters())
        said = r"lacks 1 tensors that the model has: layers\.5\.bias, and has 1 that the model has not: extra"
        with pytest.raises(InputError, match=said):
            dispatch.load_checkpoint_in_model(model, path, strict=True)
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        with pytest.warns(UserWarning, match=said):
            dispatch.load_checkpoint_in_model(model, path)
        assert model.layers[5].bias is kept
        assert torch.equal(model.layers[5].weight, reference.layers[5].weight)  # type: ignore[index, union-attr]
        with pytest.warns(UserWarning, match=said), pytest.raises(InputError, match="have no values"):
            dispatch.load_checkpoint_and_dispatch(empty(Shuffled), path, {"": "cpu"})
        model = Shuffled().eval()
        with torch.no_grad():
            model.layers[5].bias.copy_(reference.layers[5].bias)  # type: ignore[index, union-attr, operator, arg-type]
        with pytest.warns(UserWarning, match=said):
            dispatch.load_checkpoint_and_dispatch(
                model, path, {"": "cpu", "layers.5": "disk"}, offload_folder=tmp_path / f"offload {kind}"
            )
        assert torch.equal(answer(model), answer(reference))


# What is wrong


def damaged(folder: Path, fault: str) -> Path:
    state = ZOO["shuffled"].build().state_dict()
    if fault == "nothing there":
        return folder / "nothing"
    if fault == "another model":
        state["layers.3.weight"] = torch.ones(3, 3)
        return write(state, folder / "checkpoint", "folder")
    if fault == "another model, pickled":
        state["layers.3.weight"] = torch.ones(3, 3)
        return write(state, folder / "checkpoint", "bin")
    kind = "bin shards" if "shard" in fault else "bin" if "pickle" in fault else "shards"
    path = write(state, folder / "checkpoint", kind)
    files = sorted((folder / "checkpoint").glob("part-*"))
    if fault in ("a shard is gone", "a file is gone"):
        files[1].unlink()
    elif fault == "cut short":
        files[1].write_bytes(files[1].read_bytes()[:-3])
    elif fault == "pickle with code":
        torch.save({"layers.0.weight": Runs()}, path)
    elif fault == "pickle of a list":
        torch.save([torch.ones(3)], path)
    elif fault == "no pickle at all":
        path.write_bytes(b"not a pickle")
    return path


class Runs:
    """Would leave a trace, if it were unpickled."""

    ran: list[int] = []

    def __reduce__(self) -> Any:
        return Runs.ran.append, (1,)


FAULTS = (
    "nothing there", "another model", "another model, pickled", "a shard is gone", "a file is gone", "cut short",
    "pickle with code", "pickle of a list", "no pickle at all",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_leaves_the_model_as_it_was(fault: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, fault)
    model = Shuffled().eval()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    attempts: list[Callable[[], Any]] = [
        lambda: dispatch.load_checkpoint_in_model(model, path),
        lambda: dispatch.load_checkpoint_in_model(model, path, dtype="float16"),
        lambda: dispatch.load_checkpoint_and_dispatch(model, path, {"": "cpu"}, dtype="float16"),
    ]
    for attempt in attempts:
        with pytest.raises(PlanError) as caught:
            attempt()
        assert isinstance(caught.value, (InputError, PlanMismatchError))
        for name, parameter in model.named_parameters():
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])
    assert Runs.ran == []


def test_a_read_that_fails_in_the_middle_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(ZOO["shuffled"].build().state_dict(), tmp_path / "checkpoint", "shards")
    read = dispatch.Checkpoint.read_into
    left = [4]

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise InputError("the disk is gone")
        read(self, *args, **kwargs)

    monkeypatch.setattr(dispatch.Checkpoint, "read_into", failing)
    for places in (None, {"": 0}, {"": "cpu", "layers.1": 0}):
        model = Shuffled().eval()
        before = dict(model.named_parameters())
        left[0] = 4
        with pytest.raises(InputError, match="the disk is gone"):
            dispatch.load_checkpoint_and_dispatch(model, path, places, dtype=torch.float16, devices=PLAYED)
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert all("forward" not in vars(module) for module in model.modules())


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(ZOO["shuffled"].build().state_dict(), tmp_path / "checkpoint", "bin")
    (tmp_path / "file").write_text("")
    model = empty(Shuffled)
    for load in (dispatch.load_checkpoint_and_dispatch, dispatch.load_checkpoint_in_model):
        with pytest.raises(InputError, match="cannot write"):
            load(model, path, {"": "disk"}, offload_folder=tmp_path / "file" / "folder")  # type: ignore[operator]
        with pytest.raises(InputError, match="offload_folder"):
            load(model, path, {"": "disk"})  # type: ignore[operator]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_one_process_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="broadcast_from_rank0"):
        dispatch.load_checkpoint_and_dispatch(Rooted(), tmp_path, {"": "cpu"}, broadcast_from_rank0=True)
    with pytest.raises(InputError, match="offload_8bit_bnb"):
        dispatch.load_checkpoint_in_model(Rooted(), tmp_path, offload_8bit_bnb=True)
    with pytest.raises(InputError, match="which torch does not have"):
        dispatch.load_checkpoint_in_model(
            Shuffled(), write(Shuffled().state_dict(), tmp_path / "c", "file"), dtype="float17"
        )


# Maps that are asked for by name


@pytest.mark.parametrize("choice", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_maps_by_name_ask_the_planner(choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def balanced(model: nn.Module, **given: Any) -> dict[Any, Any]:
        asked.append(("balanced", given))
        return {0: "1KB", "cpu": "1GB"}

    def infer(model: nn.Module, **given: Any) -> dict[str, Any]:
        asked.append(("infer", given))
        return MAP

    monkeypatch.setattr(planner, "get_balanced_memory", balanced, raising=False)
    monkeypatch.setattr(planner, "infer_auto_device_map", infer, raising=False)
    reference = ZOO["shuffled"].build()
    path = write(reference.state_dict(), tmp_path / "checkpoint", "folder")
    model = dispatch.load_checkpoint_and_dispatch(
        empty(Shuffled), path, choice, max_memory={0: "2KB"}, no_split_module_classes=["Linear"], devices=PLAYED
    )
    assert torch.equal(answer(model), answer(reference))
    assert model.hf_device_map == MAP
    shared = {"no_split_module_classes": ["Linear"], "dtype": None}
    memory = {0: "2KB"} if choice == "sequential" else {0: "1KB", "cpu": "1GB"}
    assert asked[-1] == ("infer", {**shared, "max_memory": memory, "offload_buffers": False})
    low = {"max_memory": {0: "2KB"}, "low_zero": choice == "balanced_low_0"}
    assert asked[:-1] == ([] if choice == "sequential" else [("balanced", {**shared, **low})])


def test_an_unknown_name_for_a_map() -> None:
    with pytest.raises(InputError, match=re.escape("one of auto, balanced, balanced_low_0, sequential")):
        dispatch.load_checkpoint_and_dispatch(Rooted(), "nowhere", "best")


# Beside Accelerate


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kind", ["folder", "index", "bin"])
def test_what_accelerate_loads(kind: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    path = write(ZOO["shuffled"].build().state_dict(), tmp_path / "checkpoint", kind)
    found = []
    for load, folder in (
        (accelerate.load_checkpoint_and_dispatch, "theirs"),
        (dispatch.load_checkpoint_and_dispatch, "ours"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(empty(Shuffled), str(path), NAMED, offload_folder=str(tmp_path / folder), dtype=dtype)
        found.append(answer(model, rows().to(dtype or torch.float32)))
    assert torch.equal(*found)
    assert found[0].shape[1] == WIDTH
