"""A dispatched model gives the bits of a plain one, wherever its weights wait; and is plain again afterwards."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dispatch
import planner
from dispatch.mover import mover
from planner.errors import InputError, PlanMismatchError
from tiny_models import CONFIGS, Case, on_cpu, spread_over_two, streamed


def half_on_disk(case: Case) -> planner.Plan:
    """Return the planner's own plan for a machine whose RAM holds about half of the weights."""
    whole = case.plan(gpus=0)
    plan = case.plan(gpus=0, max_memory={"cpu": whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 2})
    assert any(p.home == "disk" for p in plan.placements)
    return plan


def plan_for(case: Case, mode: str) -> planner.Plan:
    if mode == "resident":
        return case.plan(gpus=0)
    if mode == "disk":
        return half_on_disk(case)
    one = case.plan(gpus="1x24GB")
    if mode == "gpu":
        return one
    if mode == "two gpus":
        return spread_over_two(streamed(case.plan(gpus="2x24GB"), "cpu"))
    return streamed(one, {"gpu from host": "cpu", "gpu from disk": "disk"}[mode])


MODES = ["resident", "disk", "gpu", "gpu from host", "gpu from disk", "two gpus"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_same_bits_as_the_plain_model(make_case: Any, name: str, mode: str) -> None:
    case = make_case(name, torch.bfloat16 if name in ("llama", "mixtral") else torch.float32)
    plan = plan_for(case, mode)
    case.run_like(plan)
    want, tokens = case.logits(case.reference), case.generate(case.reference)

    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert torch.equal(case.logits(model), want)
    assert torch.equal(case.logits(model), want), "a second call must see the same weights"
    assert torch.equal(case.generate(model), tokens)

    plain = dispatch.remove(model)
    assert "forward" not in vars(plain)
    assert not any("forward" in vars(module) for module in plain.modules())
    state = plain.state_dict()
    for key, value in case.reference.state_dict().items():
        assert torch.equal(state[key], value), key
    if plan.execution.experts is not None:
        plain.set_experts_implementation(plan.execution.experts)
    assert torch.equal(case.logits(plain), want)


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_experts_of_any_ranking_are_read_where_they_belong(make_case: Any, home: str) -> None:
    case = make_case("mixtral")
    plan = case.plan(gpus="1x24GB")
    blocks = [layer.name for layer in plan.graph.layers if ".layers." in layer.name]
    popularity = planner.Popularity.of(dict.fromkeys(blocks, (3, 1, 4, 2, 9, 0, 8, 8)))
    assert popularity is not None
    plan = streamed(dataclasses.replace(plan, graph=popularity.on(plan.graph)), home, resident_slices=3)
    assert plan.graph.rankings() == dict.fromkeys(blocks, (4, 6, 7, 2, 0, 3, 1, 5))
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert torch.equal(case.logits(model), case.logits(case.reference))
    state = dispatch.remove(model).state_dict()
    for key, value in case.reference.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("chunk", [4, 6])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_prompt_in_chunks_gives_the_bits_of_the_plain_model(make_case: Any, name: str, chunk: int) -> None:
    case = make_case(name)
    plan = streamed(case.plan(gpus="1x24GB", prefill_chunk=chunk), "cpu")
    case.run_like(plan)

    def answer(model: Any, **options: Any) -> Any:
        mask = torch.ones_like(case.ids)
        return model.generate(
            case.ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip

    want = answer(case.reference, prefill_chunk_size=chunk)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    found = answer(model, prefill_chunk_size=chunk)
    assert torch.equal(found.sequences, want.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, want.logits, strict=True))
    with pytest.warns(UserWarning, match=f"prefill_chunk_size={chunk}"):
        answer(model)


@pytest.mark.parametrize("mode", ["gpu from host", "disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_loaded_model_needs_no_checkpoint(make_case: Any, tmp_path: Path, name: str, mode: str) -> None:
    case = make_case(name)
    plan = plan_for(case, mode)
    case.run_like(plan)
    want = case.logits(case.reference)
    model = case.loaded()
    if mode == "disk":
        before = dict(model.named_parameters())
        with pytest.raises(InputError, match="offload_dir"):
            dispatch.apply(model, plan)
        assert dict(model.named_parameters()) == before, "a refusal changes nothing"
    model = dispatch.apply(model, plan, devices=on_cpu(plan), offload_dir=tmp_path / "offload")
    assert torch.equal(case.logits(model), want)


def test_resident_plans_leave_no_hooks(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder)
    assert not any("forward" in vars(module) for module in model.modules())


def test_resident_parameters_of_a_loaded_model_stay_the_same_objects(make_case: Any) -> None:
    case = make_case("tied-llama")
    model = case.loaded()
    before = dict(model.named_parameters())
    dispatch.apply(model, case.plan(gpus=0))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["tied-llama", "gpt2"])
@pytest.mark.parametrize("mode", ["resident", "disk", "gpu from host"])
def test_ties_hold(make_case: Any, name: str, mode: str) -> None:
    case = make_case(name)
    plan = plan_for(case, mode)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    dispatch.remove(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_non_persistent_buffers_are_computed(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder)
    assert torch.equal(model.model.rotary_emb.inv_freq, case.reference.model.rotary_emb.inv_freq)


def test_a_name_or_a_folder_is_built_here(make_case: Any) -> None:
    case = make_case("llama")
    plan = planner.plan_model(str(case.folder), gpus=0, use_cache=False, prompt_tokens=13, new_tokens=6, batch_size=2)
    model = dispatch.apply(str(case.folder), plan)
    assert torch.equal(case.logits(model), case.logits(case.reference))
    model = dispatch.apply(case.config, plan, checkpoint=case.folder)
    assert torch.equal(case.logits(model), case.logits(case.reference))


def test_streamed_weights_are_on_meta_between_calls_and_only_then(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    seen: list[bool] = []
    projection = model.model.layers[1].mlp.up_proj
    projection.register_forward_pre_hook(lambda module, args: seen.append(module.weight.is_meta))
    case.logits(model)
    assert seen == [False]
    assert projection.weight.is_meta
    assert model.device.type == "cpu"


def test_memory_of_slots_is_bounded(make_case: Any) -> None:
    """Every streamed parameter is a view into one of the planned slots."""
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    seen: set[int] = set()
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(
            lambda module, args: seen.add(module.weight.untyped_storage().data_ptr())
        )
    case.logits(model)
    slots = plan.slots_on("cuda:0", "groups")
    assert slots is not None
    assert 1 <= len(seen) <= slots.count


def test_signature_is_kept(make_case: Any) -> None:
    case = make_case("llama")
    plain = inspect.signature(case.reference.forward)
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert inspect.signature(model.forward) == plain


@pytest.mark.parametrize("mode", ["gpu from host", "gpu from disk", "disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_exception_leaves_the_model_usable(make_case: Any, name: str, mode: str) -> None:
    case = make_case(name)
    plan = plan_for(case, mode)
    case.run_like(plan)
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    inner = model.model.layers[1].self_attn.o_proj

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = inner.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        case.logits(model)
    handle.remove()
    assert torch.equal(case.logits(model), want)


def test_two_models_share_a_process(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    one = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    two = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    want = case.logits(case.reference)
    assert torch.equal(case.logits(one), want)
    assert torch.equal(case.logits(two), want)
    dispatch.remove(one)
    assert torch.equal(case.logits(two), want)


def test_a_plan_for_another_model_is_refused(make_case: Any) -> None:
    case = make_case("llama")
    model = case.meta()
    other = CONFIGS["tied-llama"]()
    other.hidden_size = 32
    plan = planner.plan_model(other, gpus=0, use_cache=False, weight_dtype="float32")
    with pytest.raises(PlanMismatchError, match=r"embed_tokens.*\[320, 32\].*\[320, 64\]"):
        dispatch.apply(model, plan, checkpoint=case.folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(PlanMismatchError, match="bfloat16"):
        dispatch.apply(model, dataclasses.replace(case, dtype=torch.bfloat16).plan(gpus=0), checkpoint=case.folder)


def test_a_checkpoint_of_another_model_is_refused(make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    other = CONFIGS["llama"]()
    other.intermediate_size = 96
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    model = case.meta()
    with pytest.raises(PlanMismatchError, match="another model"):
        dispatch.apply(model, case.plan(gpus=0), checkpoint=tmp_path / "other")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("fault", ["missing shard", "truncated"])
def test_a_damaged_checkpoint_is_refused_before_anything_changes(make_case: Any, fault: str) -> None:
    case = make_case("llama")
    shard = sorted(case.folder.glob("*.safetensors"))[1]
    if fault == "missing shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    model = case.meta()
    with pytest.raises(InputError, match=shard.name):
        dispatch.apply(model, case.plan(gpus=0), checkpoint=case.folder)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_replaced_file_is_noticed_before_a_call(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), half_on_disk(case), checkpoint=case.folder)
    case.logits(model)
    shard = sorted(case.folder.glob("*.safetensors"))[0]
    shard.rename(shard.with_suffix(".old"))
    shard.write_bytes(shard.with_suffix(".old").read_bytes())
    with pytest.raises(InputError, match=shard.name):
        case.logits(model)


def test_refusals(make_case: Any) -> None:
    case = make_case("llama")
    plan = case.plan(gpus="1x24GB")
    with pytest.raises(InputError, match="give the checkpoint"):
        dispatch.apply(case.meta(), case.plan(gpus=0))
    with pytest.raises(InputError, match="cuda:9"):
        dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices={"cuda:9": "cpu"})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda:0"):
            dispatch.apply(case.meta(), plan, checkpoint=case.folder)
    with pytest.raises(InputError, match="not dispatched"):
        dispatch.remove(case.meta())
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder)
    with pytest.raises(InputError, match="dispatched already"):
        dispatch.apply(model, case.plan(gpus=0), checkpoint=case.folder)


def test_more_than_was_planned_is_warned_of_once(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    longer = torch.ones(2, 40, dtype=torch.long)
    with pytest.warns(UserWarning, match="40 tokens of context"), torch.no_grad():
        model(longer)


def test_what_several_layers_take_is_moved_once() -> None:
    moved: dict[int, Any] = {}
    before = mover(torch.device("meta"), moved)
    shared, own = torch.ones(3), torch.ones(2)
    args, kwargs = before((own,), {"pair": (shared, shared), "flag": True, "none": None})
    again, _ = before((shared,), {})
    assert args[0].device.type == "meta"
    assert kwargs["flag"] is True
    assert kwargs["none"] is None
    assert kwargs["pair"][0] is kwargs["pair"][1] is again[0]
    assert len(moved) == 2
    there = torch.ones(1, device="meta")
    for value in ((there, shared), [there, [shared]], {"one": there, "other": shared}):
        (inside,), _ = before((value,), {})
        assert all(tensor.device.type == "meta" for tensor in torch.utils._pytree.tree_leaves(inside))
    given = ((there, (there,)), {"one": there, "flag": 1})
    assert before(*given) == given
    del own
    assert len(moved) == 1, "a copy outlives what it was made of"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_threads_wait_for_each_other(make_case: Any, name: str) -> None:
    case = make_case(name)
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    case.run_like(plan)
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: case.logits(model), range(24)))
    assert all(torch.equal(result, want) for result in results)


def test_remove_refuses_a_changed_file_and_can_be_tried_again(make_case: Any) -> None:
    case = make_case("llama")
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), half_on_disk(case), checkpoint=case.folder)
    shard = sorted(case.folder.glob("*.safetensors"))[0]
    kept = shard.with_suffix(".kept")
    shard.rename(kept)
    shard.write_bytes(kept.read_bytes())
    with pytest.raises(InputError, match=shard.name):
        dispatch.remove(model)
    kept.replace(shard)
    assert torch.equal(case.logits(model), want), "still dispatched, still right"
    assert torch.equal(case.logits(dispatch.remove(model)), want)


@pytest.mark.parametrize("mode", ["gpu from disk", "disk"])
def test_a_removal_that_fails_leaves_the_model_dispatched(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    case = make_case("mixtral")
    plan = plan_for(case, mode)
    case.run_like(plan)
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))

    def unreadable(self: Any) -> None:
        raise InputError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("dispatch.stores.DiskStore.to_host", unreadable)
        with pytest.raises(InputError, match="the disk is gone"):
            dispatch.remove(model)
    assert torch.equal(case.logits(model), want)
    assert torch.equal(case.logits(dispatch.remove(model)), want)


def test_a_failed_copy_gives_its_slot_back(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "disk")
    want = case.logits(case.reference)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))

    def unreadable(*args: Any) -> None:
        raise InputError("the disk stumbled")

    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr("dispatch.stores.DiskStore.copy_to", unreadable)
            with pytest.raises(InputError, match="stumbled"):
                case.logits(model)
    assert torch.equal(case.logits(model), want)


def test_a_loaded_model_is_not_mixed_with_other_weights(make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    plan = half_on_disk(case)
    model = case.loaded()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    want = case.logits(model)
    with pytest.raises(InputError, match="offload_dir"):
        dispatch.apply(model, plan, checkpoint=case.folder)
    assert torch.equal(case.logits(model), want)
    assert torch.equal(case.logits(dispatch.apply(model, plan, offload_dir=tmp_path / "offload")), want)


def test_a_checkpoint_in_another_dtype_is_refused_before_anything_changes(make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    case.reference.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = case.meta()
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="another dtype"):
        dispatch.apply(model, half_on_disk(case), checkpoint=tmp_path / "half")
    assert model.config._attn_implementation == "eager"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_would_meet_weights_that_are_elsewhere_is_refused(make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    with pytest.raises(InputError, match=r"dispatch\.remove"):
        model.to(torch.bfloat16)
    # The state of a dispatched model is that of the plain one, and it can be copied: see test_whole_state.py and
    # test_copying.py.
    state = case.reference.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    model.load_state_dict({name: tensor * 2 for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name] * 2) for name, tensor in model.state_dict().items())
    assert torch.equal(
        case.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), case.logits(case.reference)
    )
    plain = dispatch.remove(model)
    plain.load_state_dict(case.reference.state_dict())
    assert torch.equal(case.logits(plain.to("cpu")), case.logits(case.reference))
