"""dispatch.checkpoint against files that safetensors and transformers wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispatch import checkpoint as checkpoint_module
from dispatch.checkpoint import Checkpoint
from planner.errors import InputError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (6, 40), dtype=torch.uint8, generator=generator)
    made = {str(dtype): noise.clone().view(dtype) for dtype in DTYPES}
    return made | {"empty": torch.empty(3, 0, 2), "scalar": torch.tensor(2.5), "one": torch.ones(1, 1, 1)}


@pytest.fixture
def saved(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_every_dtype_and_shape_reads_and_maps_to_the_same_bytes(saved: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(saved)
    assert set(checkpoint.names()) == set(tensors)
    assert len(checkpoint) == len(tensors)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        entry = checkpoint[name]
        assert (entry.name, entry.file, entry.dtype, entry.nbytes) == (
            name,
            saved,
            tensor.dtype,
            tensor.nbytes,
        )
        assert entry.shape == tuple(tensor.shape)
        for read in (checkpoint.read(entry), checkpoint.map(entry)):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(read) == as_bytes(tensor)


def test_unknown_names(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    assert "scalar" in checkpoint
    assert "nothing" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["nothing"]


def test_a_folder_with_index_equals_the_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = tmp_path / "model.safetensors.index.json"
    for path in (tmp_path, index, str(tmp_path)):
        checkpoint = Checkpoint.open(path)
        assert set(checkpoint.names()) == set(model.state_dict())
        for shard in shards:
            for name, tensor in load_file(shard).items():
                assert checkpoint[name].file == shard
                assert as_bytes(checkpoint.map(checkpoint[name])) == as_bytes(tensor)


def test_a_folder_without_index_takes_every_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "part-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "part-2.safetensors")
    assert Checkpoint.open(tmp_path).names() == ("a", "b")


def test_model_safetensors_is_preferred_to_other_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint["a"].file.name == "model.safetensors"


def test_a_tensor_that_the_index_leaves_out_counts(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(tmp_path).names()) == {"a", "b"}


@pytest.mark.parametrize("chunk_bytes", [7, 64, 2**26])
def test_read_into_any_range_in_any_chunks(
    saved: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint_module, "_READ_CHUNK_BYTES", chunk_bytes)
    checkpoint = Checkpoint.open(saved)
    entry = checkpoint["torch.float32"]
    expected = as_bytes(tensors["torch.float32"])
    for start, stop in ((0, None), (0, 0), (3, 50), (200, 240)):
        length = len(expected[start:stop])
        memory = torch.full((length + 2,), 99, dtype=torch.uint8)
        checkpoint.read_into(entry, memory[1:-1], start=start, stop=stop)
        assert as_bytes(memory[1:-1]) == expected[start:stop]
        assert (memory[0], memory[-1]) == (99, 99)


def test_read_into_a_parameter(saved: Path, tensors: dict[str, Tensor]) -> None:
    parameter = torch.nn.Parameter(torch.empty(6, 10))
    checkpoint = Checkpoint.open(saved)
    checkpoint.read_into(checkpoint["torch.float32"], parameter)
    assert as_bytes(parameter.detach()) == as_bytes(tensors["torch.float32"])


def test_read_into_refuses_what_does_not_fit(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    entry = checkpoint["torch.float32"]
    with pytest.raises(ValueError, match="do not fill"):
        checkpoint.read_into(entry, torch.empty(3))
    with pytest.raises(ValueError, match="not within"):
        checkpoint.read_into(entry, torch.empty(3), start=0, stop=241)
    with pytest.raises(ValueError, match="contiguous CPU"):
        checkpoint.read_into(entry, torch.empty(10, 6).T)
    with pytest.raises(ValueError, match="contiguous CPU"):
        checkpoint.read_into(entry, torch.empty(6, 10, device="meta"))


def test_a_write_to_a_mapped_tensor_never_reaches_the_file(saved: Path) -> None:
    before = saved.read_bytes()
    checkpoint = Checkpoint.open(saved)
    tensor = checkpoint.map(checkpoint["torch.float32"])
    tensor.fill_(7)
    assert saved.read_bytes() == before
    assert as_bytes(checkpoint.read(checkpoint["torch.float32"])) != as_bytes(tensor)


def test_mapped_tensors_outlive_the_checkpoint(saved: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(saved)
    tensor = checkpoint.map(checkpoint["torch.int64"])
    del checkpoint
    assert as_bytes(tensor) == as_bytes(tensors["torch.int64"])


def test_mapped_tensors_share_the_page_cache_and_unaligned_ones_are_copied(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "floats": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    floats = torch.tensor([1.5, -2.0])
    path = tmp_path / "unaligned.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"abc" + as_bytes(floats))
    checkpoint = Checkpoint.open(path)
    assert torch.equal(checkpoint.map(checkpoint["floats"]), floats)
    assert bytes(checkpoint.map(checkpoint["odd"]).tolist()) == b"abc"
    first, second = (checkpoint.map(checkpoint["odd"]).data_ptr() for _ in range(2))
    assert first == second


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    count = 2 * pages * page_bytes
    text = json.dumps({"huge": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + count)  # a sparse file: it takes no space
        except OSError:
            pytest.skip("this file system holds no sparse file of twice the memory")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.map(checkpoint["huge"])[-1] == 0


def test_unchanged_files_pass(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    checkpoint.read(checkpoint["scalar"])
    checkpoint.check_unchanged()


def test_a_relative_path_survives_a_change_of_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    checkpoint = Checkpoint.open(saved.name)
    monkeypatch.chdir("/")
    checkpoint.check_unchanged()


def test_a_replaced_file_is_noticed_and_the_old_one_still_read(saved: Path, tensors: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint.open(saved)
    other = saved.with_name("other")
    other.write_bytes(bytes(saved.stat().st_size))
    os.utime(other, ns=(saved.stat().st_atime_ns, saved.stat().st_mtime_ns))
    other.replace(saved)
    with pytest.raises(InputError, match=r"model\.safetensors was replaced"):
        checkpoint.check_unchanged()
    assert as_bytes(checkpoint.read(checkpoint["scalar"])) == as_bytes(tensors["scalar"])


def test_a_truncated_file_is_noticed(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    name = checkpoint.names()[-1]
    os.truncate(saved, saved.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model\.safetensors shrank from [\d,]+ to [\d,]+ bytes"):
        checkpoint.check_unchanged()
    with pytest.raises(InputError, match=r"bytes are there and [\d,]+ are needed"):
        checkpoint.read(checkpoint[name])
    with pytest.raises(InputError, match="cannot be mapped"):
        checkpoint.map(checkpoint["torch.float32"])


def test_a_file_written_to_or_deleted_is_noticed(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    os.utime(saved, ns=(0, saved.stat().st_mtime_ns + 1))
    with pytest.raises(InputError, match="was written to"):
        checkpoint.check_unchanged()
    saved.unlink()
    with pytest.raises(InputError, match="was deleted"):
        checkpoint.check_unchanged()


def test_equal_compares_dtype_shape_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "COMPARE_BYTES", 32)
    base = torch.arange(12.0)
    other = base.clone()
    other[-1] = 0
    made = {
        "a": base,
        "same": base.clone(),
        "other": other,
        "shape": base.reshape(3, 4).clone(),
        "long": base.long(),
    }
    save_file(made, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    equal = {name for name in made if checkpoint.equal(checkpoint["a"], checkpoint[name])}
    assert equal == {"a", "same"}
