from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from planner import models
from planner.errors import InputError, TraceError
from planner.models import CatalogueEntry, ModelSource, catalogue, load_config, resolve_model

ROOT = Path(models.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run_python(script: str, **environment: str) -> Any:
    """Run `script` in a new interpreter and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The catalogue


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.id)
def test_parameters_are_those_of_the_built_model(entry: CatalogueEntry) -> None:
    source = resolve_model(entry.id)
    assert source.id == entry.id
    assert source.config["model_type"] == entry.model_type
    assert source.config["torch_dtype"] in {"float32", "float16", "bfloat16"}
    config = load_config(source)
    (architecture,) = config.architectures
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


@pytest.mark.parametrize(
    ("model_id", "published"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
        ("EleutherAI/gpt-neox-20b", 20_554_567_680),
        ("bigscience/bloom", 176_247_271_424),
        ("deepseek-ai/DeepSeek-V3", 671_026_404_352),
        ("openai/gpt-oss-120b", 116_829_156_672),
        ("openai-community/gpt2", 124_439_808),
    ],
)
def test_parameters_are_the_published_ones(model_id: str, published: int) -> None:
    assert {entry.id: entry.parameters for entry in catalogue()}[model_id] == published


def test_the_catalogue_is_large_and_whole() -> None:
    assert len(catalogue()) >= 45
    index = json.loads((models.CATALOGUE / "index.json").read_text())
    files = {path.name for path in models.CATALOGUE.glob("*.json")} - {"index.json"}
    assert {entry["file"] for entry in index.values()} == files
    for path in models.CATALOGUE.glob("*.json"):
        assert "://" not in path.read_text(), path


def test_no_name_stands_for_two_models() -> None:
    owner_of: dict[str, str] = {}
    for entry in catalogue():
        for name in (entry.id, *entry.aliases):
            for key in (name.lower(), name.lower().rpartition("/")[2]):
                assert owner_of.setdefault(key, entry.id) == entry.id, key


# Names


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("mistralai/Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistralai/mixtral-8x7b-V0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gpt2", "openai-community/gpt2"),
        (" GPT2-XL ", "openai-community/gpt2-xl"),
        ("bert-base-uncased", "google-bert/bert-base-uncased"),
    ],
)
def test_names_that_resolve(name: str, model_id: str) -> None:
    source = resolve_model(name)
    assert (source.id, source.source, source.revision, source.folder) == (model_id, "catalogue", None, None)


def test_the_note_says_what_was_taken() -> None:
    assert resolve_model("mistralai/Mixtral-8x7B").note == (
        "mistralai/Mixtral-8x7B is taken as mistralai/Mixtral-8x7B-v0.1, from the bundled catalogue"
    )
    assert resolve_model("microsoft/phi-2").note == "microsoft/phi-2 is from the bundled catalogue"


def test_a_published_sibling_keeps_its_own_id_and_the_shared_config() -> None:
    base, instruct = resolve_model("Mixtral-8x7B"), resolve_model("Mixtral-8x7B-Instruct-v0.1")
    assert base.id != instruct.id
    assert base.config_digest == instruct.config_digest


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("mixtrl-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistral-ai/Mixtral-8x7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("meta-lama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B"),
        ("gpt2-xxl", "openai-community/gpt2-xl"),
    ],
)
def test_near_misses_are_suggested(name: str, suggestion: str) -> None:
    with pytest.raises(InputError, match="Did you mean") as caught:
        resolve_model(name)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize("name", ["zzzz/qqqq", "qqqqqq", "two words", "nul\0byte", "x" * 5000])
def test_unknown_names_say_what_there_is(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert f"`plan models` lists the {len(catalogue())} models" in str(caught.value)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(InputError, match="has no name"):
        resolve_model("  ")


def test_hub_for_a_model_of_the_catalogue_points_back_to_it() -> None:
    for options in ({"hub": True}, {"revision": "main"}):
        with pytest.raises(InputError, match="in the bundled catalogue, which is used when --hub"):
            resolve_model("gpt2", **options)  # type: ignore[arg-type]


# Folders


def test_a_local_folder(folder: Path) -> None:
    source = resolve_model(str(folder))
    digest = hashlib.sha256(json.dumps(TINY, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert source == ModelSource(
        id=str(folder),
        source="local",
        revision=None,
        config=TINY,
        config_digest=digest,
        folder=str(folder.resolve()),
        note=f"the config was read from {folder / 'config.json'}",
    )
    assert resolve_model(str(folder / "config.json")) == source


def test_the_digest_ignores_the_order_and_spacing_of_the_file(folder: Path) -> None:
    before = resolve_model(str(folder)).config_digest
    (folder / "config.json").write_text(json.dumps(dict(reversed(TINY.items())), indent=4))
    assert resolve_model(str(folder)).config_digest == before


def test_a_config_of_another_name_has_no_folder(folder: Path) -> None:
    (folder / "config.json").rename(folder / "tiny.json")
    source = resolve_model(str(folder / "tiny.json"))
    assert (source.id, source.folder) == (str(folder / "tiny.json"), None)


def test_a_folder_wins_over_the_catalogue_if_it_has_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "gpt2").mkdir()
    assert resolve_model("gpt2").source == "catalogue"
    (folder / "config.json").rename(folder / "gpt2" / "config.json")
    assert resolve_model("gpt2").source == "local"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"", "is not JSON"),
        (b'{"model_type": "llama", ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'[{"model_type": "llama"}]', "must hold a JSON object, and holds a list"),
        (b"null", "must hold a JSON object"),
        (b"{}", "names no model_type"),
        (b'{"model_type": null}', "names no model_type"),
        (b'{"model_type": ["llama"]}', "names no model_type"),
    ],
)
def test_hostile_folders(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "~/missing-model", "/missing/model", "a/b/c", "missing.json"])
def test_missing_paths(name: str) -> None:
    with pytest.raises(InputError, match="does not exist; give a folder"):
        resolve_model(name)


def test_a_path_that_exists_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "saved").mkdir()
    with pytest.raises(InputError, match="there is a folder saved here"):
        resolve_model("saved/tiny")


def test_a_weights_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="give the folder that holds it"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_revision_of_a_path_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="leave --revision out"):
        resolve_model(str(folder), revision="main")


# Configs as transformers sees them


def test_load_config(folder: Path) -> None:
    source = resolve_model(str(folder))
    config = load_config(source)
    assert isinstance(config, transformers.LlamaConfig)
    assert config.hidden_size == 64
    assert source.config == TINY


def test_an_unknown_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    source = resolve_model(str(folder))
    with pytest.raises(TraceError, match=r"transformers \S+, which is installed, .*'no_such_type'"):
        load_config(source)


@pytest.mark.parametrize("wrong", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_size": 65}])
def test_values_that_transformers_refuses(folder: Path, wrong: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps({**TINY, **wrong}))
    source = resolve_model(str(folder))
    with pytest.raises(InputError, match="refuses the config"):
        load_config(source)


def test_remote_code_is_refused_unless_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(sys, "path", sys.path.copy())  # transformers puts that folder on it
    code = {"model_type": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(code))
    (folder / "configuration_odd.py").write_text(
        "from transformers import PreTrainedConfig\nclass OddConfig(PreTrainedConfig):\n    model_type = 'odd'\n"
    )
    with pytest.raises(InputError, match=r"Python code of its own .* --trust-remote-code"):
        resolve_model(str(folder))
    source = resolve_model(str(folder), trust_remote_code=True)
    with pytest.raises(InputError, match="Python code of its own"):
        load_config(source)
    assert type(load_config(source, trust_remote_code=True)).__name__ == "OddConfig"


# What is imported, and the Hub


def test_the_catalogue_and_folders_load_neither_torch_nor_transformers(folder: Path) -> None:
    loaded = run_python(
        "import json, sys\n"
        "from planner.models import catalogue, resolve_model\n"
        f"catalogue(), resolve_model('Mixtral-8x7B'), resolve_model({str(folder)!r})\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not {"torch", "transformers", "huggingface_hub", "numpy"} & set(loaded)


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers /<owner>/<model>/resolve/<revision>/config.json as the Hub does."""

    errors = {
        "/gated/model/resolve/main/config.json": (403, "GatedRepo"),
        "/no/model/resolve/main/config.json": (404, "RepoNotFound"),
        "/no/config/resolve/main/config.json": (404, "EntryNotFound"),
        "/good/model/resolve/v9/config.json": (404, "RevisionNotFound"),
        "/down/model/resolve/main/config.json": (503, ""),
    }

    def do_HEAD(self) -> None:
        status, code = self.errors.get(self.path, (200, ""))
        config = {**TINY, "auto_map": {}} if "code" in self.path else TINY
        self.body = json.dumps(config).encode() if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(self.body).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ASK = """
import json
from planner.errors import InputError
from planner.models import resolve_model

answers = []
for name, options in json.loads(CASES):
    try:
        source = resolve_model(name, **options)
        answers.append([source.id, source.source, source.revision, source.note])
    except InputError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(cases: list[tuple[str, dict[str, object]]], **environment: str) -> Any:
    # huggingface_hub reads its environment once, at import, hence a new interpreter.
    return run_python(f"CASES = {json.dumps(cases)!r}\n{ASK}", **environment)


def test_the_hub_and_its_cache(hub: str, tmp_path: Path) -> None:
    cache = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    found, gpt2, gated, missing, no_config, no_revision, code, down = ask(
        [
            ("good/model", {}),
            ("gpt2", {"hub": True}),
            ("gated/model", {}),
            ("no/model", {}),
            ("no/config", {}),
            ("good/model", {"revision": "v9"}),
            ("code/model", {}),
            ("down/model", {}),
        ],
        **cache,
    )
    assert found == ["good/model", "hub", COMMIT, "good/model is from the Hub, at commit 0123456789ab"]
    assert gpt2[:3] == ["openai-community/gpt2", "hub", COMMIT]
    assert gpt2[3].startswith("gpt2 is taken as openai-community/gpt2, from the Hub")
    assert "gated" in gated
    assert "HF_TOKEN" in gated
    assert "no model no/model, here or on the Hub" in missing
    assert "no/config has no config.json on the Hub" in no_config
    assert "good/model has no revision v9" in no_revision
    assert "Python code of its own" in code
    assert "could not be fetched from the Hub" in down
    assert "503" in down

    (cached,) = ask([("good/model", {})], **{**cache, "HF_HUB_OFFLINE": "1"})
    assert cached == found
    (cached,) = ask([("good/model", {})], **{**cache, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert cached == found


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be fetched"),
    ],
)
def test_without_a_network_the_answer_comes_at_once(environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    start = time.monotonic()
    (answer,) = ask([("some-one/some-model", {})], HF_HOME=str(tmp_path), **environment)
    assert time.monotonic() - start < 5
    assert reason in answer
    assert "`plan models` lists" in answer
