"""Pickles of dispatched models, which are read as models dispatched alike, and of their parts: plain modules."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from held_things import memories, movable
from plain_modules import WIDTH, ZOO, rows
from torch import nn

import dispatch
from dispatched_zoo import CPU, PLAYED, answers, dispatched, hooked, same
from planner.errors import InputError, PlanMismatchError
from tiny_models import experts_away, on_cpu, streamed

HOMES = [("cpu", 0), ("cpu", 0, "disk"), ("mapped",)]
pytestmark = pytest.mark.usefixtures("one_thread")


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    with io.BytesIO() as file:
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("name", ["rooted", "tied", "uncalled", "shuffled", "recurrent", "holding", "graph"])
def test_what_is_read_is_dispatched_alike(name: str, homes: tuple[Any, ...], tmp_path: Path) -> None:
    plain = ZOO[name].build()
    expected, state = answers(name, plain), plain.state_dict()
    model = dispatched(name, tmp_path, *homes)
    for through in (through_pickle, through_torch):
        before = {path: dict(vars(module)) for path, module in model.named_modules()}
        read = through(model)
        assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
        assert hooked(read) == hooked(model)
        assert read.hf_device_map == model.hf_device_map
        assert not set(movable(read)) & set(movable(model)), "something is in both"
        assert not set(memories(read)) & set(memories(model)), "both have one memory"
        for each in (read, model, through_pickle(read), copy.deepcopy(read)):
            assert same(answers(name, each), expected)
            assert same(list(each.state_dict().values()), list(state.values()))
        if name == "tied":
            assert read.state_dict()["head.weight"].data_ptr() == read.state_dict()["embed.weight"].data_ptr()
        dispatch.remove_hook_from_submodules(read)
        assert same(list(read.state_dict().values()), list(state.values()))
        assert [p.requires_grad for p in read.parameters()] == [p.requires_grad for p in plain.parameters()]
        if name == "tied":
            assert read.head.weight is read.embed.weight


def test_accelerates_are_not_pickled() -> None:
    accelerate = pytest.importorskip("accelerate")
    theirs = accelerate.cpu_offload(ZOO["shuffled"].build(), "cpu")
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(theirs)


# Other processes

_READS = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "without us":
    sys.modules["dispatch"] = sys.modules["planner"] = None
held = torch.load(sys.argv[2], weights_only=False)
with torch.no_grad():
    assert torch.equal(held["module"](held["x"]), held["expected"])
print(sum("forward" in vars(each) for each in held["module"].modules()))
"""


@pytest.mark.parametrize("kind", ["with us", "without us"])
def test_another_process_reads_it(kind: str, tmp_path: Path) -> None:
    model = dispatched("shuffled", tmp_path / "away", "cpu", 0, "disk")
    module = model if kind == "with us" else model.layers[2]
    with torch.no_grad():
        held = {"module": module, "x": rows(), "expected": module(rows())}
    torch.save(held, tmp_path / "held.pt")
    here = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", _READS, str(here), str(tmp_path / "held.pt"), kind],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (len(hooked(model)) if kind == "with us" else 0)


# Files


@pytest.mark.parametrize("homes", [("disk",), ("mapped",)])
@pytest.mark.parametrize("fault", ["gone", "written to", "another file", "shorter", "before it is pickled"])
def test_files_that_are_not_what_they_were(fault: str, homes: tuple[Any, ...], tmp_path: Path) -> None:
    model = dispatched("shuffled", tmp_path, *homes)
    (file,) = tmp_path.glob("*.safetensors")
    if fault == "before it is pickled":
        os.utime(file, ns=(0, 0))
        for attempt in (pickle.dumps, copy.deepcopy):
            with pytest.raises(InputError, match="was written to"):
                attempt(model)  # type: ignore[operator]
        return
    stored = pickle.dumps(model)
    held = file.stat()
    assert len(stored) < 60_000 + 2 * WIDTH * WIDTH * 4
    if fault == "gone":
        file.unlink()
    elif fault == "written to":
        os.utime(file, ns=(0, held.st_mtime_ns + 1))
    elif fault == "shorter":
        file.write_bytes(file.read_bytes()[:-4])
        os.utime(file, ns=(0, held.st_mtime_ns))
    else:
        other = dispatched("nested", tmp_path / "other", "disk")
        assert other is not None
        (tmp_path / "other" / file.name).replace(file)
    with pytest.raises(InputError, match=r"loadplan-offload\.safetensors"):
        pickle.loads(stored)


def test_weights_on_disk_are_not_in_the_pickle_and_others_need_no_file(make_case: Any) -> None:
    case = make_case("llama")
    nbytes = sum(t.nbytes for t in case.reference.state_dict().values())
    stored = {}
    for home in ("cpu", "disk"):
        model = dispatch.load_checkpoint_and_dispatch(
            case.meta(), case.folder, {"": home, "model.norm": 0}, devices=PLAYED
        )
        stored[home] = pickle.dumps(model)
    assert len(stored["disk"]) < nbytes / 3
    assert nbytes < len(stored["cpu"]) < nbytes * 1.2 + 200_000
    assert torch.equal(case.logits(pickle.loads(stored["disk"])), case.logits(case.reference))
    for file in case.folder.iterdir():
        file.unlink()
    assert torch.equal(case.logits(pickle.loads(stored["cpu"])), case.logits(case.reference))
    with pytest.raises(InputError, match="cannot be opened"):
        pickle.loads(stored["disk"])


def test_what_was_written_to_mapped_pages_is_in_the_pickle(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    model = dispatch.disk_offload(network, tmp_path, "cpu")
    without = len(pickle.dumps(model))
    with torch.no_grad(), dispatch.weights_at_home(model):
        model[2].weight.mul_(2)
    stored = pickle.dumps(model)
    assert 64 * 64 * 4 <= len(stored) - without < 2 * 64 * 64 * 4
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(stored).parameters(), model.parameters(), strict=True))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = pickle.dumps(dispatched("shuffled", tmp_path, 0, "cpu"))
    whole = pickle.dumps(dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), "cpu")[0])
    # It is told before tensors are read, which torch would refuse in words of its own.
    monkeypatch.setattr("dispatch.copying.is_here", lambda device: False)
    monkeypatch.setattr("torch.storage._load_from_bytes", None)
    for one in (stored, whole):
        with pytest.raises(InputError, match=r"cpu.*this machine has no such device.*dispatch\.remove"):
            pickle.loads(one)


# Parts, and bigger objects


@pytest.mark.parametrize("homes", [*HOMES, ("disk",)])
def test_a_part_is_read_as_a_plain_module(homes: tuple[Any, ...], tmp_path: Path) -> None:
    plain: Any = ZOO["nested"].build()
    model = dispatched("nested", tmp_path, *homes)
    for path in ("inner", "inner.inner.after"):
        for through in (through_pickle, through_torch):
            read = through(model.get_submodule(path))
            assert not hooked(read)
            assert all(type(p) is nn.Parameter and p.requires_grad and p.device == CPU for p in read.parameters())
            assert torch.equal(read(rows()), plain.get_submodule(path)(rows()))
            with torch.no_grad():
                for parameter in read.parameters():
                    parameter.zero_()
    assert same(answers("nested", model), answers("nested", plain))


class Holder:
    """Something that trains: it has a model twice, an optimizer, and a part."""

    def __init__(self, model: Any):
        self.model, self.other = model, [model]
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if not p.is_meta], lr=0.1)
        self.part = model.layers[1]


def test_a_model_inside_of_something_else(tmp_path: Path) -> None:
    holder = Holder(dispatched("shuffled", tmp_path, 0, "cpu"))
    read = through_pickle(holder)
    assert read.other[0] is read.model
    trained = read.optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(trained, (p for p in read.model.parameters() if not p.is_meta), strict=True))
    for each in (holder, read):
        each.model(rows()).sum().backward()
        each.optimizer.step()
    assert same(answers("shuffled", read.model), answers("shuffled", holder.model))
    assert torch.equal(read.part(rows()), holder.part(rows()))


def test_a_pickle_that_fails_leaves_the_model(tmp_path: Path) -> None:
    model = dispatched("shuffled", tmp_path, "cpu", 0)
    expected = answers("shuffled", model)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    model.layers[1].note = lambda: None
    for one in (model, model.layers, model.layers[1]):
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            pickle.dumps(one)
    del model.layers[1].note
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert same(answers("shuffled", model), expected)
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(dispatched("parametrized", tmp_path, "cpu"))


# Models that run by a plan


@pytest.mark.parametrize("kind", ["cpu", "disk", "experts", "resident"])
def test_models_that_run_by_a_plan(kind: str, make_case: Any, tmp_path: Path) -> None:
    case = make_case("mixtral" if kind == "experts" else "tied-llama")
    plan = case.plan(gpus="1x24GB")
    if kind == "experts":
        plan = experts_away(plan, limit=0)
    elif kind != "resident":
        plan = streamed(plan, kind)
    case.run_like(plan)
    given = case.loaded()
    given.set_attn_implementation("eager")
    model = dispatch.apply(
        given, plan, devices=on_cpu(plan), on_exceed="refuse", offload_dir=tmp_path if kind == "disk" else None
    )
    read = through_torch(model)
    assert isinstance(read, type(case.reference))
    assert read.device == model.device
    for each in (read, model):
        assert torch.equal(case.logits(each), case.logits(case.reference))
        assert torch.equal(case.generate(each), case.generate(case.reference))
        with pytest.raises(PlanMismatchError), torch.no_grad():
            each(torch.ones(2, 64, dtype=torch.long))
    dispatch.remove(model)
    plain: Any = dispatch.remove(read)
    assert torch.equal(case.logits(plain), case.logits(case.reference))
    assert plain.config._attn_implementation == "eager"
    if kind == "experts":
        assert plain.get_experts_implementation() == model.get_experts_implementation() != "loadplan_routed"
