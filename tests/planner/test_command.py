"""The `plan` command: what it prints, what it writes, and that nothing is lost when something is wrong."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.commands import options, terminal
from planner.commands.layout import Page, fold
from planner.commands.main import main
from planner.commands.placement_table import placement_rows, table_lines
from planner.commands.progress import Progress
from planner.errors import InfeasibleError, InputError
from planner.phrases import device_list, ranges
from planner.plan import Plan

MIXTRAL = ("--model", "mistralai/Mixtral-8x7B", "--gpus", "2x24GB")
HEAVY = ("torch", "transformers", "ortools", "pandas", "plotly", "huggingface_hub")


@pytest.fixture(scope="module", autouse=True)
def kept_answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep answers in a folder of this file's own, so that each question is planned once."""
    folder = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOADPLAN_CACHE", str(folder))
        patch.delenv("NO_COLOR", raising=False)
        yield folder


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of `plan` with these words."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> Plan:
    code, out, err = ask(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return Plan.from_json(out)


def loaded_after(code: str, folder: Path) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after running `code`."""
    asked = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    environment = {**os.environ, "LOADPLAN_CACHE": str(folder)}
    ran = subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    return set(ran.stderr.split())


# What is printed.


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "gpt2"),
        ("--model", "gpt2", "--gpus", "1x24GB", "--batch", "3", "--new-tokens", "1"),
        ("--model", "gpt2", "--gpus", "3x500MB", "--ram", "5GB", "--prompt", "64"),
        ("--model", "gpt2", "--ram", "4.4GB", "--prompt", "64", "--dtype", "fp32"),
        MIXTRAL,
        ("--model", "mistralai/Mixtral-8x7B", "--gpus", "0", "--ram", "64GB"),
    ],
)
def test_text_fits_80_columns_and_accounts_for_every_layer(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    plan = planned(capsys, *words)
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    rows = placement_rows(plan)
    assert sum(row.count for row in rows if not row.exception) == len(plan.graph.layers)
    assert sum(row.nbytes for row in rows) == sum(placement.nbytes for placement in plan.placements)


def test_text_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    code, out, _ = ask(capsys, *MIXTRAL)
    assert code == 0
    flat = " ".join(out.split())
    assert plan.prediction is not None
    assert plan.solver is not None
    for assumption in plan.assumptions:
        assert assumption in flat
    for device in plan.hardware.devices:
        number = f"{plan.prediction.peak_bytes[device.name] / 1e9:,.2f}"
        assert number in flat
    assert f"{plan.prediction.tokens_per_s:.3g} tokens/s" in flat
    assert plan.solver.status == "optimal"
    assert "Proven optimal: no placement that is considered costs less under the cost model" in flat
    for words in ("prefill", "decode", "weights", "activ-", "context", "GB = 10^9", "RTX 4090", "host RAM"):
        assert words in flat


def test_missing_gpus_are_an_assumption_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--gpus was not given (assumed)" in ask(capsys, "--model", "gpt2")[1]
    assert "--gpus was not given" not in ask(capsys, "--model", "gpt2", "--gpus", "0")[1]


def test_irregular_placements_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "gpt2", "--gpus", "1x24GB")
    for groups in (
        {"attn"},
        {"attn", "mlp"},
        {group.name for kind in plan.graph.kinds for group in kind.groups},
    ):
        placements = tuple(
            dataclasses.replace(p, home="cpu", memory="pinned")
            if p.layer.startswith("transformer.h.") and int(p.layer.split(".")[-1]) % 2 and p.group in groups
            else p
            for p in plan.placements
        )
        lines = table_lines(placement_rows(dataclasses.replace(plan, placements=placements)), 78)
        assert len(lines) <= 9
        assert any("6 of the 12" in line and "cpu (pinned)" in line for line in lines)


def test_layers_that_alternate_between_devices_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "gpt2", "--gpus", "1x24GB")
    placements = tuple(
        dataclasses.replace(p, home="cpu", run_on="cpu", memory="pageable")
        if p.layer.startswith("transformer.h.") and int(p.layer.split(".")[-1]) % 2
        else p
        for p in plan.placements
    )
    rows = placement_rows(dataclasses.replace(plan, placements=placements))
    assert [(row.layers, row.count) for row in rows if "h." in row.layers] == [
        ("6 of transformer.h.0–10", 6),  # noqa: RUF001  the dash of a range
        ("6 of transformer.h.1–11", 6),  # noqa: RUF001  the dash of a range
    ]


def test_partly_resident_experts_say_how_many_stay(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    some = {"model.layers.30": 5, "model.layers.31": 5}
    placements = tuple(
        dataclasses.replace(p, home="cpu", memory="pinned", resident_slices=some[p.layer])
        if p.layer in some and p.group == "mlp.experts"
        else p
        for p in plan.placements
    )
    rows = placement_rows(dataclasses.replace(plan, placements=placements))
    run_on = plan.run_on()[-3]
    assert f"5 of 8 {run_on}, 3 cpu (pinned)" in [row.kept for row in rows]


def test_plan_without_prediction_or_proof_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = dataclasses.replace(planned(capsys, "--model", "gpt2"), prediction=None, solver=None)
    plan.save(tmp_path / "plan.json")
    code, out, err = ask(capsys, "show", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    assert "nothing is predicted" in out
    assert "nothing is proven" in " ".join(out.split())


def test_plan_over_capacity_is_said_not_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "gpt2")
    assert plan.prediction is not None
    peaks = {**plan.prediction.peak_bytes, "cpu": 10**12}
    lying = dataclasses.replace(plan, prediction=dataclasses.replace(plan.prediction, peak_bytes=peaks))
    assert "DOES NOT FIT: cpu would hold 876.0 GB too much" in terminal.render(lying)


def test_hostile_names_neither_steer_the_terminal_nor_widen_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--model", "gpt2")
    model = dataclasses.replace(plan.model, id="\x1b[2J" + "long" * 60, note="a\rb\nc")
    names = {layer.name: f"{layer.name}.\x1b]0;{'deep.' * 30}" for layer in plan.graph.layers}
    layers = tuple(dataclasses.replace(layer, name=names[layer.name]) for layer in plan.graph.layers)
    placements = tuple(dataclasses.replace(p, layer=names[p.layer]) for p in plan.placements)
    hostile = dataclasses.replace(
        plan,
        model=model,
        graph=dataclasses.replace(plan.graph, layers=layers, ties=()),
        placements=placements,
    )
    text = terminal.render(hostile)
    assert max(map(len, text.splitlines())) <= 80
    assert text.replace("\n", "").isprintable()


def test_color_only_where_it_is_wanted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ask(capsys, "--model", "gpt2")[1]
    coloured = ask(capsys, "--model", "gpt2", "--color", "always")[1]
    assert "\x1b[1m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert options.wants_color("auto")
    assert not options.wants_color("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not options.wants_color("auto")
    assert options.wants_color("always")


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, quiet, shown in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        with Progress(quiet=quiet) as progress:
            progress.report("tracing")
            progress.report("placing")
        text = stream.getvalue()
        assert "\n" not in text
        assert bool(text) == shown
        assert not shown or text.endswith("\r\x1b[K")


def test_page_lines_cannot_steer_a_terminal() -> None:
    page = Page(color=True)
    page.line("a\x1b[31mb\rc", "bold")
    page.line("x" * 100)
    assert page.text() == f"\x1b[1ma?[31mb c\x1b[0m\n{'x' * 79}…\n"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([], []), ([4], ["4"]), ([0, 1, 2, 5, 7, 8], ["0–2", "5", "7–8"])],  # noqa: RUF001
)
def test_ranges(numbers: list[int], expected: list[str]) -> None:
    assert ranges(numbers) == expected


def test_device_list_and_fold() -> None:
    assert device_list(["cuda:0", "cuda:1", "cuda:2", "cpu", "disk"]) == "cuda:0–2, cpu and disk"  # noqa: RUF001
    assert device_list(["node0/cuda:0", "node1/cuda:0"]) == "node0/cuda:0 and node1/cuda:0"
    assert fold("model.language_model.layers.3", 16) == ["model.language_", "model.layers.3"]


# What is written.


def test_json_is_exactly_the_canonical_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_file = tmp_path / "plan.json"
    code, out, err = ask(capsys, *MIXTRAL, "--json", "--out", str(out_file))
    assert (code, err) == (0, "")
    assert out == Plan.from_json(out).to_json()
    assert out_file.read_bytes().decode() == out
    assert ask(capsys, "show", str(out_file), "--json")[1] == out
    assert ask(capsys, "show", str(out_file))[1] == ask(capsys, *MIXTRAL)[1]
    assert ask(capsys, "verify", str(out_file))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_report_is_written_from_a_plan_and_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, again, saved = (str(tmp_path / name) for name in ("page.html", "again.html", "plan.json"))
    code, _, err = ask(capsys, "--model", "gpt2", "--report", page, "--out", saved)
    assert code == 0
    assert err.splitlines() == [f"plan: wrote {saved}", f"plan: wrote {page}"]
    assert ask(capsys, "show", saved, "--report", again)[0] == 0
    assert Path(page).read_text() == Path(again).read_text()
    assert "plotly" in Path(page).read_text()


def test_out_through_a_link_keeps_the_link(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    assert ask(capsys, "--model", "gpt2", "--out", str(link))[0] == 0
    assert link.is_symlink()
    assert target.read_text().startswith("{")


# Caches and imports.


def test_cached_answer_loads_nothing_heavy(capsys: pytest.CaptureFixture[str], kept_answers: Path) -> None:
    first = ask(capsys, "--model", "gpt2")
    code = "from planner.commands.main import main; assert main(['--model', 'gpt2']) == 0"
    assert loaded_after(code, kept_answers) == set()
    assert ask(capsys, "--model", "gpt2") == first


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["models"], ["gpus"], ["show", "--help"], ["--batch"]])
def test_light_commands_load_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = f"from planner.commands.main import main; main({words!r})"
    assert {name for name in loaded_after(code, tmp_path) if name in HEAVY} == set()


def test_damaged_cache_is_rebuilt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADPLAN_CACHE", str(tmp_path))
    words = ("--model", "gpt2", "--gpus", "1x24GB", "--prompt", "32", "--json")
    first = ask(capsys, *words)
    entries = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert entries
    for damage in (
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b"1", b"2"),
    ):
        for path, data in entries.items():
            path.write_bytes(damage(data))
        assert ask(capsys, *words) == first
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == entries


def test_no_cache_keeps_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADPLAN_CACHE", str(tmp_path))
    assert ask(capsys, "--model", "gpt2", "--prompt", "32", "--no-cache")[0] == 0
    assert list(tmp_path.iterdir()) == []


# What goes wrong.

NOT_USABLE: list[tuple[tuple[str, ...], str]] = [
    ((), "--model"),
    (("--model", "./nowhere"), "./nowhere"),
    (("--model", ""), "no name"),
    (("--gpus", "2x24GB"), "--model"),
    (("--model", "gpt2", "--gpus", "2x"), "2x24GB"),
    (("--model", "gpt2", "--gpus", "2xvoodoo"), "voodoo"),
    (("--model", "gpt2", "--gpus", "0x24GB"), "0x24GB"),
    (("--model", "gpt2", "--gpus", "2x0GB"), "no memory"),
    (("--model", "gpt2", "--gpus", "-1"), "-1"),
    (("--model", "gpt2", "--ram=-1GB"), "negative"),
    (("--model", "gpt2", "--ram", "-1GB"), "negative"),
    (("--model", "gpt2", "--disk", "-1"), "negative"),
    (("--model", "gpt2", "--ram", "0"), "zero"),
    (("--model", "gpt2", "--ram", "lots"), "lots"),
    (("--model", "gpt2", "--batch", "0"), "--batch"),
    (("--model", "gpt2", "--batch", "-3"), "--batch"),
    (("--model", "gpt2", "--prompt", "many"), "--prompt"),
    (("--model", "gpt2", "--new-tokens", "1.5"), "--new-tokens"),
    (("--model", "gpt2", "--dtype", "int4"), "int4"),
    (("--model", "gpt2", "--max-memory", "cpu"), "NAME=SIZE"),
    (("--model", "gpt2", "--max-memory", "cpu=1GB,"), "NAME=SIZE"),
    (("--model", "gpt2", "--max-memory", "cpu=1GB,cpu=2GB"), "twice"),
    (("--model", "gpt2", "--gpus", "24GB", "--max-memory", "0=1GB", "--max-memory", "cuda:0=1GB"), "twice"),
    (("--model", "gpt2", "--max-memory", "cpu=much"), "much"),
    (("--model", "gpt2", "--max-memory", "cpu=0"), "zero"),
    (("--model", "gpt2", "--max-memory=cpu=-1GB"), "negative"),
    (("--model", "gpt2", "--max-memory", "cuda:7=1GB"), "cuda:7"),
    (("--model", "gpt2", "--modle", "x"), "--modle"),
    (("--model", "gpt2", "--color", "pink"), "pink"),
    (("--model", "gpt2", "--revision"), "--revision"),
    (("gpt2",), "--model gpt2"),
    (("models", "no such model"), "no such model"),
    (("show",), "PLAN.json"),
    (("show", "/nowhere/plan.json"), "/nowhere/plan.json"),
]


@pytest.mark.parametrize(("words", "said"), NOT_USABLE)
def test_unusable_input_is_one_clear_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text("what was there before")
    is_plan = words and words[0].startswith("-")
    code, out, err = ask(capsys, *(["--out", str(kept)] if is_plan else []), *words)
    assert (code, out) == (2, "")
    assert err.startswith("plan: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert said in err
    assert kept.read_text() == "what was there before"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]

    code, out, err = ask(capsys, *words, "--json")
    told = json.loads(out)
    assert (code, told["exit_code"], told["error"], err) == (2, 2, "InputError", "")
    assert said in told["message"]


MEMORY = [
    (("memory", "--model", "gpt2", "--gpu", "gtx1"), "gtx1"),
    (("memory", "--model", "gpt2", "--gpu", "l4", "--threads", "2"), "threads"),
    (("memory", "--model", "gpt2", "--top-p", "2"), "top_p"),
    (("memory", "--model", "gpt2", "--answers", "2"), "num_return_sequences"),
    (("memory",), "--model"),
]


@pytest.mark.parametrize(("words", "said"), MEMORY, ids=str)
def test_memory_refuses_what_it_cannot_use(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = ask(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("gpu", [None, "l4"])
def test_memory_is_told_phase_by_phase(capsys: pytest.CaptureFixture[str], gpu: str | None) -> None:
    words = ("memory", "--model", "gpt2", "--prompt", "40", "--new-tokens", "6", "--beams", "2", "--quiet")
    words += ("--gpu", gpu) if gpu else ()
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    for word in ("2 beams", "prefill", "last decode", "KV cache", "float32"):
        assert word in out
    assert ("reserved" in out) == (gpu is not None)
    told = json.loads(ask(capsys, *words, "--json")[1])
    assert len(told["decode"]) == 5
    assert told["peak"]["requested_bytes"] == sum(told["peak"]["parts"].values())
    assert told["weight_bytes"] == told["peak"]["parts"]["weights"]
    if gpu:
        assert told["peak"]["requested_bytes"] <= told["peak"]["allocated_bytes"] <= told["peak"]["reserved_bytes"]
        assert told["device_used_bytes"] > told["peak"]["reserved_bytes"]
    else:
        assert told["peak"]["reserved_bytes"] is None


def test_unknown_model_without_a_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str, **_: Any) -> None:
        raise InputError(f"there is no model {name}\nhere")

    monkeypatch.setattr("planner.given.resolve_model", nowhere)
    assert ask(capsys, "--model", "gtp2") == (2, "", "plan: error: there is no model gtp2 here\n")


def test_nothing_fits_says_the_shortfall_and_a_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text("before")
    words = ("--model", "gpt2", "--ram", "4.3GB", "--disk", "0", "--prompt", "64", "--out", str(kept))
    code, out, err = ask(capsys, *words)
    assert (code, out) == (InfeasibleError.exit_code, "")
    message, head, *fixes = err.splitlines()
    assert "cpu" in message
    assert "--ram" in message
    assert head.endswith("make it fit (each was planned again):")
    assert fixes
    assert all(line.startswith("  ") and len(line) <= 80 for line in fixes)
    told = json.loads(ask(capsys, *words, "--json")[1])
    assert told["device"] == "cpu"
    assert told["needed_bytes"] > told["available_bytes"]
    assert told["smallest_fix"] in err
    assert [fix["text"] for fix in told["fixes"]] == [line.removeprefix("  - ") for line in fixes]
    assert kept.read_text() == "before"


def test_model_that_transformers_has_no_class_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForNothing"], "vocab_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = ask(capsys, "--model", str(tmp_path))
    assert (code, out, err.count("\n")) == (6, "", 1)


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_unwritable_outputs_are_found_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("the work started")

    monkeypatch.setattr("planner.api.plan_model", worked)
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path in (
        "folder",
        "missing/plan.json",
        "config.json/plan.json",
        os.devnull,
        "-",
        "",
        "x" * 300,
        "a\0b",
    ):
        code, out, err = ask(capsys, "--model", "gpt2", option, path)
        assert (code, out, err.count("\n")) == (2, "", 1), path
        assert option in err
    code, _, err = ask(capsys, "--model", "config.json", option, "config.json")
    assert code == 2
    assert "overwrite" in err
    assert (tmp_path / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "folder"]
    assert Path(os.devnull).is_char_device()


def test_read_only_file_is_not_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text("before")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write what is read-only
    code, _, err = ask(capsys, "--model", "gpt2", "--out", str(kept))
    assert code == 2
    assert "read-only" in err
    assert kept.read_text() == "before"


def test_one_path_for_two_outputs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    code, _, err = ask(capsys, "--model", "gpt2", "--out", path, "--report", path)
    assert code == 2
    assert "two paths" in err


def test_report_does_not_overwrite_its_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    assert ask(capsys, "--model", "gpt2", "--out", str(saved))[0] == 0
    before = saved.read_bytes()
    assert ask(capsys, "show", str(saved), "--report", str(saved))[0] == 2
    assert saved.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no JSON", '{"schema_version": 99}', '{"schema_version": 1}'])
def test_files_that_are_no_plans(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    for command in ("show", "verify"):
        code, out, err = ask(capsys, command, str(path))
        assert (code, out, err.count("\n")) == (5, "", 1)


def test_simulate_prints_lanes_and_writes_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    plan = planned(capsys, *MIXTRAL)
    plan.save(path)
    code, out, err = ask(capsys, "simulate", str(path), "--trace", str(trace))
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^cpu compute +0\.0% +\d+\.\d%  bounds decode$", out, flags=re.MULTILINE)
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X", "C"}
    expected, drawn, again = (
        json.loads(ask(capsys, "simulate", str(path), "--json", *words)[1])
        for words in ((), ("--seed", "7"), ("--seed", "7"))
    )
    assert plan.prediction is not None
    assert expected["total_ns"] == plan.prediction.total_ns
    assert drawn == again != expected
    assert drawn["decode_ns"]["p5"] < drawn["decode_ns"]["p50"] < drawn["decode_ns"]["p95"]
    code, out, err = ask(capsys, "simulate", str(path), "--trace", str(path))
    assert code == 2
    assert Plan.load(path) == plan


def test_simulate_says_what_was_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(capsys, "--model", "bert-base-uncased", "--gpus", "24GB").save(path)
    out = ask(capsys, "simulate", str(path))[1]
    assert "prompt 512 tokens, in one forward pass" in out
    assert not re.search("prefill|decode|new token", out)
    assert re.search(r"^lane +forward$", out, flags=re.MULTILINE)
    assert re.search(r"^0\.\d{3} J for the call \(cuda:0 0\.\d+, cpu 0\.\d+\)", out, flags=re.MULTILINE)


def test_what_takes_turns_does_not_bound_the_call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(capsys, "--model", "meta-llama/Llama-3.2-3B", "--gpus", "3x3GB").save(path)
    out = ask(capsys, "simulate", str(path))[1]
    assert len(re.findall(r"^cuda:\d compute +\d+\.\d% ", out, flags=re.MULTILINE)) == 3
    assert re.search(r"% +[234]\d\.\d%  busiest in ", out)
    assert "bounds" not in out


def test_verify_lists_what_is_broken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = planned(capsys, "--model", "gpt2")
    pools = tuple(dataclasses.replace(pool, capacity_bytes=10**8) for pool in plan.hardware.pools)
    path = tmp_path / "plan.json"
    dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, pools=pools)).save(path)
    code, out, err = ask(capsys, "verify", str(path))
    assert (code, err) == (5, "")
    assert "capacity: cpu would hold" in out
    code, out, err = ask(capsys, "verify", str(path), "--json")
    told = json.loads(out)
    assert (code, told["holds"], told["violations"][0]["rule"]) == (5, False, "capacity")


def test_verify_refuses_a_plan_for_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    assert ask(capsys, "--model", "gpt2", "--out", path)[0] == 0
    assert ask(capsys, "verify", path, "--model", "openai-community/gpt2")[0] == 0
    code, out, err = ask(capsys, "verify", path, "--model", "gpt2-xl")
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert "openai-community/gpt2" in err


def test_faults_of_our_own_ask_for_debug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("planner.api.plan_model", broken)
    code, out, err = ask(capsys, "--model", "gpt2")
    assert (code, out) == (1, "")
    assert err == "plan: error: a fault of plan itself: ZeroDivisionError: two lines (--debug shows where)\n"
    code, out, err = ask(capsys, "--model", "gpt2", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert json.loads(ask(capsys, "--model", "gpt2", "--json")[1])["error"] == "ZeroDivisionError"


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.api.plan_model", stopped)
    assert ask(capsys, "--model", "gpt2") == (130, "", "plan: interrupted\n")


def test_stdout_that_nobody_reads_or_that_is_full(capsys: pytest.CaptureFixture[str], kept_answers: Path) -> None:
    assert ask(capsys, "--model", "gpt2")[0] == 0
    command = [sys.executable, "-m", "planner.commands.main", "--model", "gpt2"]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (141, "")
    if not Path("/dev/full").exists():
        return
    with Path("/dev/full").open("w") as stream:
        full = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    assert "cannot write to stdout" in full.stderr


def test_stdout_without_unicode(capsys: pytest.CaptureFixture[str], kept_answers: Path) -> None:
    expected = ask(capsys, "--model", "gpt2", "--json")[1]
    command = [sys.executable, "-m", "planner.commands.main", "--model", "gpt2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    text = subprocess.run(command, capture_output=True, env=environment, check=True, timeout=60).stdout
    assert b"Where every layer goes" in text
    plan = subprocess.run([*command, "--json"], capture_output=True, env=environment, check=True, timeout=60).stdout
    assert plan.decode("utf-8") == expected


# The other commands.


def test_models_lists_and_filters(capsys: pytest.CaptureFixture[str]) -> None:
    code, everything, _ = ask(capsys, "models")
    assert code == 0
    assert max(map(len, everything.splitlines())) <= 80
    found = ask(capsys, "models", "MIXTRAL")[1].splitlines()
    assert found
    assert {line.split()[0] for line in found} < {line.split()[0] for line in everything.splitlines()}
    assert all("mixtral" in line.lower() for line in found)
    assert json.loads(ask(capsys, "models", "mixtral", "--json")[1])[0]["model_type"] == "mixtral"


def test_gpus_lists_products(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "gpus")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "NVIDIA GeForce RTX 4090" in out
    assert "rtx4090" in json.loads(ask(capsys, "gpus", "--json")[1])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ask(capsys, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "plan verify" in out
    assert ask(capsys, "--version") == (0, f"loadplan {importlib.metadata.version('loadplan')}\n", "")
    for command in ("models", "gpus", "show", "verify"):
        assert ask(capsys, command, "--help")[0] == 0


# What is true of plans with choices of their own


def text_of(plan: Plan, **changes: Any) -> str:
    """Return what is printed of a plan, on one line."""
    return " ".join(terminal.render(dataclasses.replace(plan, **changes)).split())


def test_slots_are_counted_and_precisions_named(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    slots = (dataclasses.replace(plan.slots[0], count=1), *plan.slots[1:])
    assert "through one slot of " in text_of(plan, slots=slots)
    assert "one slot" not in text_of(plan)
    stored = tuple(dataclasses.replace(p, dtype="int8") if p.group == "self_attn" else p for p in plan.placements)
    said = text_of(plan, placements=stored)
    assert ", in int8" in said
    assert "dispatch does not run these yet" in said
    assert "int8" not in text_of(plan)
    rows = placement_rows(dataclasses.replace(plan, placements=stored))
    assert sum(row.nbytes for row in rows) == sum(p.nbytes for p in plan.placements)


def test_pageable_memory_is_not_called_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    pageable = tuple(dataclasses.replace(p, memory="pageable") if p.memory == "pinned" else p for p in plan.placements)
    said = text_of(plan, placements=pageable)
    assert "(pageable)" in said
    assert "(pinned)" not in said


def test_what_the_cpu_computes_is_told_in_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    waiting = [p for p in plan.placements if p.resident_slices is not None and p.home != p.run_on]
    assert waiting
    copied = tuple(dataclasses.replace(p, cpu_up_to_tokens=0) for p in plan.placements)
    assert "CPU computes" not in text_of(plan, placements=copied)
    assert "computed there by the CPU" not in text_of(plan, placements=copied)
    there = tuple(dataclasses.replace(p, cpu_up_to_tokens=1) if p in waiting else p for p in plan.placements)
    said = text_of(plan, placements=there)
    assert "where the CPU computes experts" in said
    assert "as decode steps are; in the longer prefill they are copied" in said


def test_several_nodes_are_named_and_no_memory_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "--model", "gpt2", "--gpus", "3*(2x24GB)/12GB")
    assert code == 0
    said = " ".join(out.split())
    assert "node0–2 each: 2 × " in said  # noqa: RUF001
    assert "node3: 1 × " in said  # noqa: RUF001
    assert "…" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_least_memory_is_proven_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "--model", "gpt2", "--gpus", "24GB", "--objective", "fit")
    assert code == 0
    said = " ".join(out.split())
    assert re.search(r"no placement that is considered takes less memory; objective [\d.]+ MB, bound [\d.]+ MB", said)
    assert "By the cost model" not in said


def test_a_search_that_was_cut_short_says_so_with_its_gap(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *MIXTRAL)
    assert plan.solver is not None
    solver = dataclasses.replace(
        plan.solver, status="feasible", bound_ns=plan.solver.objective_ns * 99 // 100, cut_short="interrupt"
    )
    said = text_of(plan, solver=solver)
    assert "An interrupt ended the search" in said
    assert re.search(r"Not proven: another placement may cost less under the cost model, by at most 1\.[01]%", said)
