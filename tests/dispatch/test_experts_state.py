"""The state of models whose fused experts wait one by one: the plain model's, saved and loaded, and never gathered."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from load_meter import resident_peak
from torch import nn

import dispatch
import planner
from dispatch import page_cache
from dispatch.scattered_tensor import ScatteredTensor
from planner.errors import InputError
from planner.plan import Placement, Plan
from tiny_models import WORK, Case, build_case, experts_away, on_cpu, streamed, with_placements, with_slots

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20
# How experts wait: in host memory or on disk for a device, or for the CPU, by the checkpoint's layout.
MODES = ("pinned", "disk", "cpu experts", "mapped")


@functools.cache
def case_of(name: str, stored: str) -> Case:
    """Return a tiny model; stored: "apart", a tensor an expert, or "fused", as they are computed with."""
    folder = Path(tempfile.mkdtemp())
    case = build_case(name, folder / "apart")
    if stored == "fused":
        case.reference.save_pretrained(folder / "fused", save_original_format=False, max_shard_size="300KB")
        case = dataclasses.replace(case, folder=folder / "fused")
    return case


@functools.cache
def plan_of(name: str, stored: str, mode: str) -> Plan:
    case = case_of(name, stored)
    if mode == "mapped":
        return streamed(planner.plan_model(str(case.folder), gpus=0, **WORK), "disk", resident_slices=2)
    plan = case.plan(gpus="1x24GB")
    if mode == "cpu experts":
        return experts_away(plan, limit=10**6, kept=2, count=0)
    return streamed(plan, "disk" if mode == "disk" else "cpu", resident_slices=3)


def dispatched(name: str, stored: str, mode: str, folder: Path | None = None) -> Any:
    case, plan = case_of(name, stored), plan_of(name, stored, mode)
    case.run_like(plan)
    return dispatch.apply(case.meta(), plan, checkpoint=folder or case.folder, devices=on_cpu(plan))


def same(found: Any, expected: Any) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", ["apart", "fused"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@torch.no_grad()
def test_saved_as_the_plain_model_is(name: str, stored: str, mode: str, tmp_path: Path) -> None:
    if mode == "mapped" and not page_cache.SUPPORTED:
        pytest.skip("the kernel does not bring pages on demand")
    case = case_of(name, stored)
    model = dispatched(name, stored, mode)
    want = case.logits(case.reference)
    assert torch.equal(case.logits(model), want)
    assert same(model.state_dict(), case.reference.state_dict())
    for original in (True, False):
        options = {"max_shard_size": "200KB", "save_original_format": original}
        case.reference.save_pretrained(tmp_path / f"plain {original}", **options)
        model.save_pretrained(tmp_path / f"dispatched {original}", **options)
        expected, found = files_of(tmp_path / f"plain {original}"), files_of(tmp_path / f"dispatched {original}")
        assert found.keys() == expected.keys()
        assert len(found) > 4
        assert [each for each in found if found[each] != expected[each]] == []
    assert torch.equal(case.logits(model), want)


@functools.cache
def large_case(stored: str) -> Case:
    """Return a Mixtral of which three quarters are experts: 72 MiB of them."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=320, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    folder = Path(tempfile.mkdtemp()) / "checkpoint"
    model.save_pretrained(folder, save_original_format=stored == "apart", max_shard_size="9MB")
    return Case(config, model, folder, torch.float32, torch.randint(3, 320, (2, 13)))


@pytest.mark.parametrize(("stored", "mode"), [("apart", "pinned"), ("apart", "disk"), ("fused", "mapped")])
def test_saving_takes_the_memory_of_one_shard(
    stored: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel's count; of what files map, pages that nobody wrote to do not count."""
    from transformers import modeling_utils

    case = large_case(stored)
    if mode == "mapped":
        plan = streamed(planner.plan_model(str(case.folder), gpus=0, **WORK), "disk", resident_slices=2)
    else:
        plan = streamed(case.plan(gpus="1x24GB"), "disk" if mode == "disk" else "cpu", resident_slices=2)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    save, held = modeling_utils.safe_save_file, []

    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))

    def saved(tensors: Any, *args: Any, **kwargs: Any) -> None:
        save(tensors, *args, **kwargs)
        held.append(anonymous_bytes())

    monkeypatch.setattr(modeling_utils, "safe_save_file", saved)
    with resident_peak() as peak:
        before = anonymous_bytes()
        model.save_pretrained(tmp_path, max_shard_size="9MB")
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert sum(shards) > 72 * MIB
    assert max(shards) < 10 * MIB
    # What passes through while a shard is filled is one expert, of 3 MiB.
    assert max(held) - before < max(shards) + 3 * MIB
    if mode != "mapped":
        assert peak.bytes < max(shards) + 6 * MIB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", ["apart", "fused"])
@torch.no_grad()
def test_other_values_are_loaded(stored: str, mode: str) -> None:
    """Also where slots still hold what was there before, and a file what is there no more."""
    case = case_of("mixtral", stored)
    plan = plan_of("mixtral", stored, mode)
    plan = with_slots(plan, 24) if mode == "pinned" else plan
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    other = case.loaded()
    other.set_experts_implementation(case.reference.get_experts_implementation())
    for parameter in other.parameters():
        parameter.copy_(parameter.flip(0) * 1.5)
    assert torch.equal(case.logits(model), case.logits(case.reference))
    if mode == "disk" or (mode, stored) in (("mapped", "apart"), ("mapped", "fused")):
        with pytest.raises(InputError, match="wait in files"):
            model.load_state_dict(other.state_dict())
        assert same(model.state_dict(), case.reference.state_dict())
        assert torch.equal(case.logits(model), case.logits(case.reference))
        return
    early = model.state_dict()
    missing = {name: t for name, t in other.state_dict().items() if "layers.1" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1"):
        model.load_state_dict(missing)
    assert model.load_state_dict(other.state_dict()).missing_keys == []
    assert torch.equal(case.logits(model), case.logits(other))
    for state in (early, model.state_dict(), dispatch.remove(model).state_dict()):
        assert same(state, other.state_dict())


def test_of_an_expert_on_disk_what_is_asked_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, source), *_ = dispatched("mixtral", "apart", "disk")._loadplan_dispatch.has.experts
    store = source._waiting[5]
    read: list[str] = []
    inner = dispatch.Checkpoint.read_into

    def noting(self: Any, entry: Any, *args: Any, **kwargs: Any) -> None:
        read.append(entry.name)
        inner(self, entry, *args, **kwargs)

    monkeypatch.setattr(dispatch.Checkpoint, "read_into", noting)
    whole = store.to_host()["gate_up_proj"].view(-1)
    half, end = whole.numel() // 2, whole.numel()
    gate, up = (next(name for name in read if name.endswith(f"{part}.weight")) for part in ("w1", "w3"))
    for start, stop, wanted in (
        (0, 1, [gate]), (0, half, [gate]), (half - 1, half, [gate]), (half - 1, half + 1, [gate, up]),
        (half, half + 1, [up]), (half, end, [up]), (end - 1, end, [up]), (0, end, [gate, up]),
    ):  # fmt: skip
        read.clear()
        assert torch.equal(store.part("gate_up_proj", start, stop), whole[start:stop])
        assert read == wanted


@pytest.mark.parametrize("mode", ["disk", "mapped"])
def test_where_experts_alone_are_in_files_nothing_is_written(mode: str) -> None:
    case = case_of("mixtral", "fused")

    def experts_alone(p: Placement, group: Any) -> Placement:
        if p.resident_slices is not None:
            return p
        return dataclasses.replace(p, home=p.run_on, memory="pageable" if p.run_on == "cpu" else "device")

    plan = with_placements(plan_of("mixtral", "fused", mode), experts_alone)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    expected = {name: tensor.clone() for name, tensor in case.reference.state_dict().items()}
    with pytest.raises(InputError, match=r"experts.* wait in files"):
        model.load_state_dict({name: tensor.flip(0) for name, tensor in expected.items()})
    assert same(model.state_dict(), expected)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
@torch.no_grad()
def test_values_that_were_loaded_outlive_a_larger_plan(name: str) -> None:
    case = case_of(name, "apart")
    plan = plan_of(name, "apart", "pinned")
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan), on_exceed="replan")
    other = case.loaded()
    if name == "mixtral":
        other.set_experts_implementation(case.reference.get_experts_implementation())
    for parameter in other.parameters():
        parameter.copy_(parameter.flip(0) * 1.5)
    model.load_state_dict(other.state_dict())
    ids = torch.randint(3, 320, (3, 40))
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert model._loadplan_dispatch.plan.workload.batch_size == 3
    assert same(model.state_dict(), other.state_dict())


def test_a_file_that_changed_is_not_believed(tmp_path: Path) -> None:
    expected = case_of("mixtral", "fused").reference.state_dict()
    for mode in ("pinned", "disk"):
        folder = tmp_path / mode
        shutil.copytree(case_of("mixtral", "fused").folder, folder)
        model = dispatched("mixtral", "fused", mode, folder)
        before = model.state_dict()
        for path in folder.glob("*.safetensors"):
            # In place, as the same file.
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.seek(size // 2)
                file.write(b"\xff" * (size - size // 2))
            os.utime(path, ns=(0, 0))
        if mode == "pinned":
            assert same(model.state_dict(), expected)
            continue
        with pytest.raises(InputError, match="written to while in use"):
            same({name: t.clone() for name, t in model.state_dict().items()}, expected)
        assert list(before) == list(expected)


def test_a_loaded_model_is_not_taken_for_its_checkpoint() -> None:
    case, plan = case_of("mixtral", "fused"), plan_of("mixtral", "fused", "pinned")
    other = case.loaded()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    model = dispatch.apply(other, plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert same(model.state_dict(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_or_gathered_before_values_are_asked_for(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = "fused" if mode == "mapped" else "apart"
    model = dispatched("mixtral", stored, mode)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.Checkpoint, "read_into", None)
        patch.setattr(ScatteredTensor, "values", None)
        state = model.state_dict()
    expected = case_of("mixtral", stored).reference.state_dict()
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert (state[name].shape, state[name].dtype, state[name].device) == (
        expected[name].shape, torch.float32, torch.device("cpu")
    )  # fmt: skip
    assert torch.equal(state[name][5], expected[name][5])
    if mode in ("pinned", "cpu experts"):
        source = {path: s for _, s in model._loadplan_dispatch.has.experts for path in s.names}[name]
        waits = source._waiting[5].views()["gate_up_proj"]
        assert state[name][5].values().data_ptr() == waits.data_ptr()
    assert all(parameter.is_meta for path, parameter in model.named_parameters() if "experts" in path)


class Adapted(nn.Module):
    """A linear layer with a product of two small ones beside it, and nothing of PEFT."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(states) + self.up(self.down(states))
        return found

    def merged(self) -> nn.Linear:
        self.base.weight += self.up.weight @ self.down.weight
        return self.base


def adapt(model: Any) -> None:
    torch.manual_seed(4)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)


def merge(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.merged()


@pytest.mark.parametrize("attention", ["resident", "pinned"])
@pytest.mark.parametrize("mode", ["pinned", "disk", "cpu experts"])
@torch.no_grad()
def test_adapters_beside_experts(mode: str, attention: str) -> None:
    case = case_of("mixtral", "apart")

    def attention_stays(p: Placement, group: Any) -> Placement:
        away = mode != "cpu experts" and p.resident_slices is None and group.streamable and attention == "pinned"
        if p.resident_slices is not None:
            return p
        return dataclasses.replace(p, home="cpu", memory="pinned") if away else dataclasses.replace(
            p, home=p.run_on, memory="device"
        )  # fmt: skip

    plan = with_placements(plan_of("mixtral", "apart", mode), attention_stays)
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    reference = case.loaded()
    case.run_like(plan)
    reference.set_experts_implementation(case.reference.get_experts_implementation())
    adapt(reference)
    with dispatch.weights_at_home(model):
        assert not any(parameter.is_meta for parameter in model.parameters())
        adapt(model)
        with pytest.raises(InputError, match="was replaced"):
            case.logits(model)
    assert torch.equal(case.logits(model), case.logits(reference))
    assert same(model.state_dict(), reference.state_dict())
    merge(reference)
    with dispatch.weights_at_home(model):
        merge(model)
    assert torch.equal(case.logits(model), case.logits(reference))
    assert same(model.state_dict(), reference.state_dict())
    assert same(dispatch.remove(model).state_dict(), reference.state_dict())


# PEFT asks transformers by a name that transformers will not keep.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("mode", ["pinned", "mapped"])
def test_adapters_of_peft(mode: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stored = "fused" if mode == "mapped" else "apart"
    case = case_of("mixtral", stored)

    def with_adapters(model: Any) -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        return peft.get_peft_model(model, config)

    model = dispatched("mixtral", stored, mode)
    reference = case.loaded()
    reference.set_experts_implementation(case.reference.get_experts_implementation())
    reference = with_adapters(reference)
    with dispatch.weights_at_home(model):
        adapted = with_adapters(model)
    assert torch.equal(case.logits(adapted), case.logits(reference))
    adapted.save_pretrained(tmp_path / "found")
    reference.save_pretrained(tmp_path / "expected")
    assert files_of(tmp_path / "found").keys() == files_of(tmp_path / "expected").keys()
    name = "adapter_model.safetensors"
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    plain = reference.merge_and_unload()
    with dispatch.weights_at_home(model):
        merged = adapted.merge_and_unload()
    assert merged is model
    assert torch.equal(case.logits(model), case.logits(plain))
    assert same(model.state_dict(), plain.state_dict())


@torch.no_grad()
def test_experts_are_changed_at_home() -> None:
    name = "model.layers.1.mlp.experts"
    for mode, stored in (("pinned", "fused"), ("cpu experts", "apart"), ("mapped", "fused"), ("disk", "fused")):
        case, model = case_of("mixtral", stored), dispatched("mixtral", stored, mode)
        changed = case.loaded()
        changed.set_experts_implementation(case.reference.get_experts_implementation())
        case.logits(model)
        changed.get_submodule(name).down_proj[:] *= -2
        changed.get_submodule(name).gate_up_proj[4, :7] = 0.5

        def change(model: Any = model, changed: Any = changed) -> None:
            experts = model.get_submodule(name)
            with pytest.raises(InputError, match="would write to weights that lie in several places"):
                experts.down_proj.mul_(-2)
            experts.down_proj = nn.Parameter(experts.down_proj.clone() * -2)
            experts.gate_up_proj[4, :7].copy_(torch.tensor(0.5))

        if mode == "disk":
            with pytest.raises(InputError, match="waits in a file"), dispatch.weights_at_home(model):
                change()
            assert same(model.state_dict(), case.reference.state_dict())
            continue
        with dispatch.weights_at_home(model):
            change()
        assert torch.equal(case.logits(model), case.logits(changed))
        assert same(model.state_dict(), changed.state_dict())


def test_experts_taken_from_their_module_are_refused() -> None:
    model = dispatched("mixtral", "apart", "pinned")
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    with pytest.raises(InputError, match="is no parameter any more"), dispatch.weights_at_home(model):
        del experts.down_proj


@torch.no_grad()
def test_a_state_is_not_taken_while_experts_are_fetched() -> None:
    """After a call that was broken off it is."""
    case, model = case_of("mixtral", "apart"), dispatched("mixtral", "apart", "pinned")
    asked: list[Any] = []

    def ask(*_: Any) -> None:
        asked.append(None)
        model.state_dict()

    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    handle = experts.act_fn.register_forward_hook(ask)
    with pytest.raises(InputError, match="in the middle of a call"):
        case.logits(model)
    handle.remove()
    assert len(asked) > 0
    assert same(model.state_dict(), case.reference.state_dict())
    assert torch.equal(case.logits(model), case.logits(case.reference))


@torch.no_grad()
def test_which_experts_stay_is_told_by_their_popularity() -> None:
    case, plan = case_of("mixtral", "fused"), plan_of("mixtral", "fused", "pinned")
    blocks = {layer.name for layer in plan.graph.layers if "layers" in layer.name}
    popularity = planner.Popularity.of(dict.fromkeys(blocks, (3, 1, 4, 2, 9, 0, 8, 8)))
    assert popularity is not None
    plan = dataclasses.replace(plan, graph=popularity.on(plan.graph))
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    sources = [source for _, source in model._loadplan_dispatch.has.experts]
    assert all(source._resident.keys() == {4, 6, 7} for source in sources)
    for source in sources:
        source._files.clear()
    assert same(model.state_dict(), case.reference.state_dict())
    other = {name: tensor.flip(0) for name, tensor in case.reference.state_dict().items()}
    model.load_state_dict(other)
    assert same(dispatch.remove(model).state_dict(), other)


@pytest.mark.parametrize("mode", ["pinned", "cpu experts", "mapped"])
@torch.no_grad()
def test_copies_have_what_was_written_since(mode: str) -> None:
    """Not what the files hold; and a part that is copied at home has values, as one that is copied elsewhere."""
    name = "model.layers.1.mlp.experts"
    case, model = case_of("mixtral", "fused"), dispatched("mixtral", "fused", mode)
    changed = case.loaded()
    changed.set_experts_implementation(case.reference.get_experts_implementation())
    changed.get_submodule(name).down_proj[:] *= -2
    with dispatch.weights_at_home(model):
        experts: Any = model.get_submodule(name)
        experts.down_proj = nn.Parameter(experts.down_proj.clone() * -2)
    with dispatch.weights_at_home(model):
        parts = [copy.deepcopy(model.get_submodule(name))]
        with pytest.raises(InputError, match="while its weights are at home"):
            copy.deepcopy(model)
    parts.append(copy.deepcopy(model.get_submodule(name)))
    for part in parts:
        assert not any(isinstance(parameter, ScatteredTensor) for parameter in part.parameters())
        assert same(part.state_dict(), changed.get_submodule(name).state_dict())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.resize_token_embeddings.__wrapped__.__self__ is made
        assert torch.equal(case.logits(made), case.logits(changed))
        assert same(made.state_dict(), changed.state_dict())
        assert same(dispatch.remove(made).state_dict(), changed.state_dict())
    assert same(model.state_dict(), changed.state_dict())
