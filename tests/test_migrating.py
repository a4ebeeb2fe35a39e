"""The migration page: every snippet, Accelerate's and ours, run in order; both give the same answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python (\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
THEIRS = [block for kind, block in BLOCKS if kind == "accelerate"]
OURS = [block for kind, block in BLOCKS if kind == "loadplan"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers says how much memory a shard takes.
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)


def answers(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run the snippets of one side in a folder of its own; return what each calls its answer."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    found = []
    for number, (side, block) in enumerate(BLOCKS):
        if side in ("both", kind):
            names["answer"] = None
            exec(compile(block, f"migrating.md, snippet {number}", "exec"), names)
            if side == kind:
                found.append(names["answer"])
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_both_sides_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = answers("loadplan", tmp_path / "ours", monkeypatch)
    assert all(answer is not None for answer in ours)
    # The plan has no counterpart there: it gives what the first model that ran did.
    logits = next(answer for answer in ours if isinstance(answer, torch.Tensor) and answer.dim() == 3)
    assert torch.equal(ours[-1], logits)
    assert not (tmp_path / "ours" / "offload").exists()

    pytest.importorskip("accelerate")
    theirs = answers("accelerate", tmp_path / "theirs", monkeypatch)
    assert len(theirs) == len(ours) - 1
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        assert same(one, other), OURS[number]
    assert (tmp_path / "theirs" / "offload").exists()


def test_most_steps_differ_in_an_import_alone() -> None:
    differing = [
        theirs
        for theirs, ours in zip(THEIRS, OURS, strict=False)
        if re.sub(r"from accelerate(\.\w+)? ", "from dispatch ", theirs) != ours
    ]
    assert len(differing) == 1
    assert "from_pretrained(\n" in differing[0]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        assert (PAGE.parent / target).exists(), target
