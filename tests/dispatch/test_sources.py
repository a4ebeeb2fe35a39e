"""dispatch.sources against what transformers saves and loads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import conversion_mapping, core_model_loading  # noqa: E402

from dispatch.checkpoint import Checkpoint  # noqa: E402
from dispatch.sources import TensorSource, resolve_sources  # noqa: E402
from planner.errors import InputError, PlanMismatchError, TraceError  # noqa: E402

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EXPERTS = 11  # more than ten, so that experts.10 must not come before experts.2


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | options))


def mixtral(**options: Any) -> Any:
    config = transformers.MixtralConfig(**TINY | {"num_local_experts": EXPERTS} | options)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **TINY, head_dim=16, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **TINY,
        moe_intermediate_size=16,
        n_routed_experts=EXPERTS,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


MODELS: list[Callable[[], Any]] = [llama, mixtral, qwen3_moe, deepseek, gpt2]


def save(model: Any, folder: Path, **options: Any) -> Checkpoint:
    """Save with made-up values everywhere, zeros and ones of fresh biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return Checkpoint.open(folder)


def fill(source: TensorSource, checkpoint: Checkpoint) -> Tensor:
    tensor = torch.full(source.shape, 77, dtype=source.dtype)
    source.fill(checkpoint, tensor)
    return tensor


def check_all(model: nn.Module, checkpoint: Checkpoint, of: nn.Module | None = None) -> None:
    """Check that every tensor of `model`, rebuilt from its source (resolved for `of`), has the same bytes."""
    expected = model.state_dict()
    sources = resolve_sources(of or model, checkpoint)
    assert set(sources) == set(expected)
    for name, tensor in expected.items():
        source = sources[name]
        assert (source.name, source.shape, source.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        assert torch.equal(fill(source, checkpoint), tensor), name
        if (entry := source.whole_entry()) is not None:
            assert torch.equal(checkpoint.map(entry), tensor), name


def check_slices(source: TensorSource, tensor: Tensor, checkpoint: Checkpoint) -> None:
    for e, expected in enumerate(tensor):
        place = torch.full(tensor.shape[1:], float("nan"), dtype=tensor.dtype)
        source.fill_slice(checkpoint, e, place)
        assert torch.equal(place, expected)


@pytest.mark.parametrize("make", MODELS)
def test_every_tensor_is_rebuilt_for_a_real_and_a_meta_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    checkpoint = save(model, tmp_path, max_shard_size="40KB")
    check_all(model, checkpoint)
    with torch.device("meta"):
        meta = make()
    check_all(model, checkpoint, of=meta)


@pytest.mark.parametrize(
    ("make", "stored"),
    [
        (mixtral, "model.layers.1.block_sparse_moe.experts.10.w2.weight"),
        (qwen3_moe, "model.layers.1.mlp.experts.10.down_proj.weight"),
        (deepseek, "model.layers.1.mlp.experts.10.down_proj.weight"),
    ],
)
def test_one_expert_is_read_alone_from_per_expert_and_from_fused_tensors(
    make: Callable[[], Any], stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    per_expert = save(model, tmp_path / "per_expert")
    fused = save(model, tmp_path / "fused", save_original_format=False)
    assert stored in per_expert
    assert "model.layers.1.mlp.experts.down_proj" in fused
    assert fused.total_bytes == per_expert.total_bytes
    read: list[int] = []
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, entry: Any, destination: Tensor, **limits: Any) -> None:
        read.append(destination.nbytes)
        read_into(self, entry, destination, **limits)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    for checkpoint in (per_expert, fused):
        sources = resolve_sources(model, checkpoint)
        for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
            tensor = model.state_dict()[name]
            read.clear()
            check_slices(sources[name], tensor, checkpoint)
            assert sum(read) == tensor.nbytes
            assert (sources[name].whole_entry() is None) == (checkpoint is per_expert)


def test_slices_of_plain_tensors_and_bad_slices(tmp_path: Path) -> None:
    model = llama()
    checkpoint = save(model, tmp_path)
    source = resolve_sources(model, checkpoint)["lm_head.weight"]
    check_slices(source, model.lm_head.weight, checkpoint)
    for e in (-1, 64):
        with pytest.raises(IndexError, match="no slice"):
            source.fill_slice(checkpoint, e, torch.empty(32))
    with pytest.raises(ValueError, match="shape"):
        source.fill_slice(checkpoint, 0, torch.empty(31))
    with pytest.raises(ValueError, match="shape"):
        source.fill(checkpoint, torch.empty(32, 64))


@pytest.mark.parametrize("chunk_bytes", [44, 2**25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_equals_to(
    tmp_path: Path, dtype: torch.dtype, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("planner.loading.BUFFER_BYTES", chunk_bytes)
    model = mixtral(num_local_experts=2)
    checkpoint = save(model, tmp_path)
    with torch.device("meta"):
        other = mixtral(num_local_experts=2).to(dtype)
    sources = resolve_sources(other, checkpoint)
    for name, tensor in model.state_dict().items():
        assert sources[name].dtype == dtype
        assert sources[name].whole_entry() is None
        assert torch.equal(fill(sources[name], checkpoint), tensor.to(dtype))
    check_slices(sources["model.layers.0.mlp.experts.gate_up_proj"], expert_weights(model, dtype), checkpoint)


def expert_weights(model: Any, dtype: torch.dtype) -> Tensor:
    weights: Tensor = model.model.layers[0].mlp.experts.gate_up_proj.detach().to(dtype)
    return weights


def test_sources_equal_what_from_pretrained_loads(tmp_path: Path) -> None:
    save(mixtral(), tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    sources = resolve_sources(loaded, checkpoint)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(fill(sources[name], checkpoint), tensor), name


def test_a_strided_destination_is_filled(tmp_path: Path) -> None:
    model = llama()
    checkpoint = save(model, tmp_path)
    place = torch.empty(32, 64).T
    resolve_sources(model, checkpoint)["lm_head.weight"].fill(checkpoint, place)
    assert torch.equal(place, model.lm_head.weight)


def test_the_base_models_prefix_is_added_and_removed(tmp_path: Path) -> None:
    whole = llama()
    check_all(whole.model, save(whole, tmp_path / "whole"))
    tied = llama(tie_word_embeddings=True)
    save(tied, tmp_path / "tied")
    tied.model.save_pretrained(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    assert "embed_tokens.weight" in base
    check_all(tied, base)


@pytest.mark.parametrize("stored", ["transformer.wte.weight", "lm_head.weight"])
def test_tied_weights_share_the_source_that_is_stored(tmp_path: Path, stored: str) -> None:
    model = gpt2()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors[stored] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    check_all(model, checkpoint)
    sources = resolve_sources(model, checkpoint)
    assert sources["lm_head.weight"].pieces == sources["transformer.wte.weight"].pieces


def test_tied_weights_stored_twice_must_agree(tmp_path: Path) -> None:
    model = gpt2()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    check_all(model, Checkpoint.open(tmp_path))
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"ties .* different values"):
        resolve_sources(model, Checkpoint.open(tmp_path))


class Plain(nn.Module):
    """A module of no library, with buffers of both kinds, a shared module and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("derived", torch.arange(4.0), persistent=False)


def test_a_plain_module_uses_its_own_names(tmp_path: Path) -> None:
    model = Plain()
    skipped = {"again.weight", "again.bias", "tied.weight"}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    check_all(model, checkpoint)
    with torch.device("meta"):  # `.to("meta")` would break the tie
        meta = Plain()
    check_all(model, checkpoint, of=meta)


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    checkpoint = save(llama(), tmp_path)
    with pytest.raises(InputError, match=r"lacks 18 of the 39 tensors: model\.layers\.2\..* and 15 more"):
        resolve_sources(llama(num_hidden_layers=4), checkpoint)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = save(llama(), tmp_path)
    with pytest.raises(PlanMismatchError, match=r"shape \(64, 32\) .* and \(64, 64\) .* another model"):
        resolve_sources(llama(hidden_size=64), checkpoint)
    with pytest.raises(InputError, match="lacks"):
        resolve_sources(gpt2(), checkpoint)
    with pytest.raises(InputError, match="lacks"):
        resolve_sources(Plain(), checkpoint)


def test_another_number_or_size_of_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = save(mixtral(), tmp_path)
    with pytest.raises(InputError, match=r"needs 12 experts, numbered from 0, and the checkpoint has 11 of"):
        resolve_sources(mixtral(num_local_experts=12), checkpoint)
    with pytest.raises(PlanMismatchError, match=r"\(11, 96, 32\) .* \(11, 80, 32\)"):
        resolve_sources(mixtral(intermediate_size=40), checkpoint)


def test_experts_that_do_not_count_up_from_zero_are_refused(tmp_path: Path) -> None:
    model = mixtral()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    tensors[name.format(11)] = tensors.pop(name.format(4))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="needs 11 experts, numbered from 0"):
        resolve_sources(model, Checkpoint.open(tmp_path))


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    model = mixtral()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fused = {"model.layers.1.mlp.experts.down_proj": torch.zeros(EXPERTS, 32, 48)}
    for extra in (fused, {"norm.weight": torch.zeros(32)}):
        save_file(tensors | extra, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="of the checkpoint stand for"):
            resolve_sources(model, Checkpoint.open(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_tensor_is_not_taken_for_a_plain_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4)
    save_file({"weight": torch.ones(4, 4).to(dtype), "bias": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="quantised"):
        resolve_sources(model, Checkpoint.open(tmp_path))


def with_converter(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    converter = core_model_loading.WeightConverter(*arguments)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_: [converter])


def test_a_conversion_that_is_not_carried_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(llama(), tmp_path)
    transpose = core_model_loading.Transpose(0, 1)
    with_converter(monkeypatch, "mlp.up_proj.weight", "mlp.up_proj.weight", [transpose])
    with pytest.raises(TraceError, match=r"layers\.0\.mlp\.up_proj\.weight.*Transpose.* not carried yet"):
        resolve_sources(llama(), checkpoint)


def test_a_split_that_is_not_carried_is_named_for_each_of_its_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        halves = [tensors.pop(f"{prefix}.{half}.weight") for half in ("gate_proj", "up_proj")]
        tensors[f"{prefix}.both.weight"] = torch.cat(halves)
    save_file(tensors, tmp_path / "model.safetensors")
    chunk = core_model_loading.Chunk(dim=0)
    with_converter(monkeypatch, "mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [chunk])
    with pytest.raises(TraceError, match=r"gate_proj.*up_proj.* and 1 more .*Chunk\(dim=0\)"):
        resolve_sources(model, Checkpoint.open(tmp_path))


@pytest.mark.parametrize("dim", [0, 1])
def test_concatenated_tensors_are_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    model = llama()
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.up_proj"
        for part, tensor in zip("ab", tensors.pop(f"{prefix}.weight").chunk(2, dim), strict=True):
            tensors[f"{prefix}_{part}.weight"] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    sources = ["mlp.up_proj_a.weight", "mlp.up_proj_b.weight"]
    with_converter(monkeypatch, sources, "mlp.up_proj.weight", [core_model_loading.Concatenate(dim=dim)])
    checkpoint = Checkpoint.open(tmp_path)
    check_all(model, checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    check_slices(resolve_sources(model, checkpoint)[name], model.state_dict()[name], checkpoint)


def test_importing_does_not_load_transformers_or_the_solver() -> None:
    code = (
        "import sys, dispatch.sources; "
        "print({'transformers', 'ortools', 'pandas', 'plotly', 'planner.trace'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
