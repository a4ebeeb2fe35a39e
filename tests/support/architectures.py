"""Small models of many architectures, with sizes drawn from a seed, and inputs for them. For tests and benchmarks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Config = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Architecture:
    """build: a model from a dtype and a source of sizes. inputs: what it is fed, from (model, batch, tokens).

    text: whether it is called with prompts; generates: whether `generate` is traced as well.
    """

    name: str
    build: Callable[[torch.dtype, random.Random], Any]
    inputs: Callable[[Any, int, int], dict[str, Any]]
    generates: bool = True
    experts: str | None = None
    examples: bool = False
    notes: tuple[str, ...] = field(default=())


def user_call(model: Any, inputs: dict[str, Any], caller: str, new_tokens: int, **options: Any) -> Callable[[], Any]:
    """Return a call as a user writes it, whose inputs are the user's own.

    caller: "forward" is one call without a cache; "loop" calls again with the cache that came back, `new_tokens` times
    in all; "generate" answers with `new_tokens` by `generate(**options)`.
    """
    if caller == "generate":
        return lambda: model.generate(**inputs, max_new_tokens=new_tokens, **{"do_sample": False, **options})
    one = next(iter(inputs.values())).shape[0]
    step = {"input_ids": torch.ones(one, 1, dtype=torch.long)}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        step = {"decoder_input_ids": torch.ones(one, 1, dtype=torch.long)}
        inputs = {**inputs, "decoder_input_ids": torch.ones(one, 1, dtype=torch.long)}
    if caller == "forward":
        without = {"use_cache": False} if hasattr(model, "generate") and model.can_generate() else {}
        return lambda: model(**inputs, **without)
    return lambda: _loop(model, inputs, step, new_tokens)


def _loop(model: Any, inputs: dict[str, Any], step: dict[str, Any], calls: int) -> None:
    out = model(**inputs, use_cache=True)
    for _ in range(calls - 1):
        again = {name: out[name] for name in ("past_key_values", "cache_params") if name in out}
        if "encoder_last_hidden_state" in out:
            again["encoder_outputs"] = (out.encoder_last_hidden_state,)
        out = model(**step, **again, use_cache=True)


def text_inputs(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(3, 300, (batch, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _decoder(config: str, *, kv: bool = True, **fixed: Any) -> Callable[[torch.dtype, random.Random], Any]:
    def build(dtype: torch.dtype, rng: random.Random) -> Any:
        import transformers

        heads = rng.choice([2, 4])
        width = heads * 16 * rng.choice([1, 2])
        shape = {
            "vocab_size": rng.randrange(300, 500), "hidden_size": width, "intermediate_size": rng.randrange(3, 9) * 16,
            "num_hidden_layers": rng.randrange(3, 6), "num_attention_heads": heads, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": None,
        }  # fmt: skip
        if kv:
            shape["num_key_value_heads"] = rng.choice([1, 2])
        made = getattr(transformers, config)(**{**shape, **fixed})
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype).eval()

    return build


def _gpt2(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    heads = rng.choice([2, 4])
    config = GPT2Config(
        vocab_size=rng.randrange(300, 500), n_embd=heads * 16, n_layer=rng.randrange(3, 6), n_head=heads,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, n_positions=128,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _opt(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        vocab_size=rng.randrange(300, 500), hidden_size=64, ffn_dim=rng.randrange(3, 9) * 32, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        word_embed_proj_dim=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _falcon(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(
        vocab_size=rng.randrange(300, 500), hidden_size=64, num_hidden_layers=rng.randrange(3, 6),
        num_attention_heads=4, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _bloom(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import AutoModelForCausalLM, BloomConfig

    config = BloomConfig(
        vocab_size=rng.randrange(300, 500), hidden_size=64, n_layer=rng.randrange(3, 6), n_head=4,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _gptj(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import AutoModelForCausalLM, GPTJConfig

    config = GPTJConfig(
        vocab_size=rng.randrange(300, 500), n_embd=64, n_layer=rng.randrange(3, 6), n_head=4, rotary_dim=8,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _deepseek(config: str) -> Callable[[torch.dtype, random.Random], Any]:
    return _decoder(
        config, kv=False, num_attention_heads=4, hidden_size=64, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=32, first_k_dense_replace=1, num_key_value_heads=4,
    )  # fmt: skip


def _t5(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=rng.randrange(300, 500), d_model=64, d_kv=16, d_ff=rng.randrange(3, 9) * 16,
        num_layers=rng.randrange(3, 5), num_heads=4, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).to(dtype).eval()


def _bart(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=rng.randrange(300, 500), d_model=64, encoder_layers=3, decoder_layers=rng.randrange(2, 5),
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        decoder_start_token_id=2, eos_token_id=None, pad_token_id=0, forced_eos_token_id=None,
        max_position_embeddings=128,
    )  # fmt: skip
    return BartForConditionalGeneration(config).to(dtype).eval()


def _whisper(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=rng.randrange(300, 500), d_model=64, encoder_layers=3, decoder_layers=3, num_mel_bins=16,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        max_source_positions=rng.randrange(3, 7) * 10, max_target_positions=64, decoder_start_token_id=2,
        eos_token_id=None, pad_token_id=0, bos_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).to(dtype).eval()


def _bert(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=rng.randrange(300, 500), hidden_size=64, num_hidden_layers=rng.randrange(3, 6),
        num_attention_heads=4, intermediate_size=rng.randrange(3, 9) * 16,
    )  # fmt: skip
    return BertModel(config).to(dtype).eval()


def _vit(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=rng.randrange(3, 6), num_attention_heads=4,
        intermediate_size=rng.randrange(3, 9) * 16, image_size=rng.choice([32, 48]), patch_size=8,
    )  # fmt: skip
    return ViTForImageClassification(config).to(dtype).eval()


def _mamba(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=rng.randrange(300, 500), hidden_size=64, num_hidden_layers=rng.randrange(3, 5), state_size=8,
        eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return MambaForCausalLM(config).to(dtype).eval()


def _llava(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=rng.randrange(310, 500), hidden_size=64, intermediate_size=rng.randrange(3, 9) * 16,
        num_hidden_layers=rng.randrange(3, 5), num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=305, image_token_index=305)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def _llava_inputs(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    patches = (32 // 8) ** 2
    ids = torch.cat([torch.full((batch, patches), 305), torch.randint(3, 300, (batch, tokens))], dim=1)
    pixels = torch.randn(batch, 3, 32, 32, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _qwen_vl(dtype: torch.dtype, rng: random.Random) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": rng.randrange(310, 500), "hidden_size": 64, "intermediate_size": rng.randrange(3, 9) * 16,
        "num_hidden_layers": rng.randrange(3, 5), "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "eos_token_id": None, "bos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=305, video_token_id=306, vision_start_token_id=307,
        vision_end_token_id=308,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).to(dtype).eval()


def _qwen_vl_inputs(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    """One picture of 8 by 8 patches in each prompt, four of which make a token."""
    picture = [torch.full((batch, n), token) for n, token in ((1, 307), (16, 305), (1, 308))]
    ids = torch.cat([*picture, torch.randint(3, 300, (batch, tokens))], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 305).int(),
        "pixel_values": torch.randn(batch * 64, 3 * 2 * 4 * 4, dtype=model.dtype),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * batch),
    }


def _seq2seq_inputs(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    return text_inputs(model, batch, tokens)


def _sound(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    frames = 2 * model.config.max_source_positions
    return {"input_features": torch.randn(batch, model.config.num_mel_bins, frames, dtype=model.dtype)}


def _pictures(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    size = model.config.image_size
    return {"pixel_values": torch.randn(batch, 3, size, size, dtype=model.dtype)}


class ResidualBlock(nn.Module):
    def __init__(self, width: int, wider: int):
        super().__init__()
        stride = 1 if width == wider else 2
        self.conv1 = nn.Conv2d(width, wider, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.down = None if width == wider else nn.Conv2d(width, wider, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return torch.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """A CNN with residual additions."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = [width * 2 ** (index // 2) for index in range(depth + 1)]
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class UNet(nn.Module):
    """An encoder and a decoder of convolutions with skips between them."""

    def __init__(self, width: int):
        super().__init__()
        self.down1 = nn.Conv2d(3, width, 3, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = torch.relu(self.down1(x))
        two = torch.relu(self.down2(one))
        three = torch.relu(self.down3(two))
        y = torch.relu(self.join2(torch.cat([self.up2(three), two], dim=1)))
        out: torch.Tensor = self.join1(torch.cat([self.up1(y), one], dim=1))
        return out


def _resnet(dtype: torch.dtype, rng: random.Random) -> Any:
    return ResNet(rng.choice([8, 16]), rng.randrange(2, 5)).to(dtype).eval()


def _unet(dtype: torch.dtype, rng: random.Random) -> Any:
    return UNet(rng.choice([8, 16])).to(dtype).eval()


def _mlp(dtype: torch.dtype, rng: random.Random) -> Any:
    widths = [rng.randrange(16, 200) for _ in range(5)]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers).to(dtype).eval()


def _images(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 3, 32, 64, dtype=next(model.parameters()).dtype)}


def _vectors(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    return {"input": torch.randn(batch, tokens, model[0].in_features, dtype=next(model.parameters()).dtype)}


ARCHITECTURES = (
    Architecture("llama", _decoder("LlamaConfig"), text_inputs),
    Architecture("llama tied", _decoder("LlamaConfig", tie_word_embeddings=True), text_inputs),
    Architecture("qwen2", _decoder("Qwen2Config"), text_inputs),
    Architecture("qwen3", _decoder("Qwen3Config", head_dim=16), text_inputs),
    Architecture("mistral sliding", _decoder("MistralConfig", sliding_window=11), text_inputs),
    Architecture("gemma2", _decoder("Gemma2Config", head_dim=16, sliding_window=9), text_inputs),
    Architecture(
        "gemma3", _decoder("Gemma3TextConfig", head_dim=16, sliding_window=9, sliding_window_pattern=2), text_inputs
    ),
    Architecture("phi", _decoder("PhiConfig"), text_inputs),
    Architecture("phi3", _decoder("Phi3Config"), text_inputs),
    Architecture("olmo2", _decoder("Olmo2Config"), text_inputs),
    Architecture("gpt-neox", _decoder("GPTNeoXConfig", kv=False), text_inputs),
    Architecture("gpt2", _gpt2, text_inputs),
    Architecture("opt", _opt, text_inputs),
    Architecture("falcon", _falcon, text_inputs),
    Architecture("bloom", _bloom, text_inputs),
    Architecture("gpt-j", _gptj, text_inputs),
    Architecture(
        "mixtral", _decoder("MixtralConfig", num_local_experts=4, num_experts_per_tok=2), text_inputs,
        experts="loadplan_grouped",
    ),
    Architecture(
        "qwen3-moe",
        _decoder("Qwen3MoeConfig", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
        text_inputs, experts="loadplan_grouped",
    ),
    Architecture(
        "gpt-oss",
        _decoder("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=9),
        text_inputs, experts="loadplan_grouped",
    ),
    Architecture("deepseek-v2", _deepseek("DeepseekV2Config"), text_inputs, experts="loadplan_grouped"),
    Architecture("deepseek-v3", _deepseek("DeepseekV3Config"), text_inputs, experts="loadplan_grouped"),
    Architecture("t5", _t5, _seq2seq_inputs),
    Architecture("bart", _bart, _seq2seq_inputs),
    Architecture("whisper", _whisper, _sound),
    Architecture("bert", _bert, text_inputs, generates=False),
    Architecture("vit", _vit, _pictures, generates=False),
    Architecture("mamba", _mamba, text_inputs),
    Architecture("llava", _llava, _llava_inputs, examples=True),
    Architecture("qwen2.5-vl", _qwen_vl, _qwen_vl_inputs, examples=True),
    Architecture("resnet", _resnet, _images, generates=False, examples=True),
    Architecture("unet", _unet, _images, generates=False, examples=True),
    Architecture("mlp", _mlp, _vectors, generates=False, examples=True),
)  # fmt: skip
