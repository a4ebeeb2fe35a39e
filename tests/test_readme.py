"""The README's own commands and snippets, run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from planner.commands.main import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()]
COMMANDS = [[part.removeprefix(".venv/bin/") for part in line.split(" && ")] for line in LINES]
PLANS = [[part for part in parts if part.startswith("plan ")] for parts in COMMANDS if " --model " in " ".join(parts)]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_lines_to_copy_are_there() -> None:
    assert "scripts/install && .venv/bin/plan --model mistralai/Mixtral-8x7B --gpus 2x24GB" in LINES
    assert "scripts/install dev && scripts/test" in LINES
    assert len(PLANS) == 9


@pytest.mark.parametrize("parts", PLANS, ids=" && ".join)
def test_commands(parts: list[str], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in parts:
        program, *arguments = shlex.split(part)
        assert program == "plan"
        assert main(arguments) == 0
        assert capsys.readouterr().out
        if "--report" in arguments:
            assert main(["show", "plan.json"]) == 0
            assert main(["verify", "plan.json"]) == 0
            assert (in_tmp_path / "placement.html").stat().st_size > 10**6


@pytest.mark.usefixtures("in_tmp_path")
def test_python() -> None:
    names: dict[str, object] = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, str(README), "exec"), names)
    model, plan = names["model"], names["plan"]
    assert any(placement.home == "disk" for placement in plan.placements)  # type: ignore[attr-defined]
    assert not any(parameter.is_meta for parameter in model.parameters())  # type: ignore[attr-defined]
    assert names["tokens"].shape == (1, 24)  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (README.parent / target).exists(), target
