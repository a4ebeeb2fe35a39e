"""Answers kept on disk, keyed by everything that they depend on. A damaged entry is a miss, and is made again.

The folder is `$LOADPLAN_CACHE`, else `$XDG_CACHE_HOME/loadplan`, else `~/.cache/loadplan`. An entry's first line is
the SHA-256 of the rest.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.serial import encode, write_text

# Entries beyond this many are dropped, oldest first.
MOST_ENTRIES = 256


def folder() -> Path:
    """Return where entries are kept; it may not exist yet."""
    named = os.environ.get("LOADPLAN_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loadplan"


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that an answer depends on, read without importing any of the packages."""
    found = {}
    for name in ("loadplan", "ortools", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def _code_digest() -> str:
    """Return a digest of our own sources, so that a changed planner never meets an old answer."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.glob("*.json"), *(root.parent / "simulate").glob("*.py")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key(kind: str, parts: Mapping[str, Any]) -> str:
    """Return the name of the entry for a question: a digest of its parts, of versions and of our own code."""
    question = {
        "kind": kind,
        "versions": versions(),
        "code": _code_digest(),
        **{k: encode(v) for k, v in parts.items()},
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def read(name: str) -> str | None:
    """Return the text kept under `name`, or None where there is none or it is damaged."""
    try:
        digest, _, text = (folder() / name).read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if hashlib.sha256(text.encode()).hexdigest() == digest else None


def write(name: str, text: str) -> None:
    """Keep `text` under `name`. A cache that cannot be written is no error: the answer is simply not kept."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_text(folder() / name, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        _drop_oldest()
    except (InputError, OSError):
        return


def _drop_oldest() -> None:
    entries = [(entry.stat().st_mtime_ns, entry) for entry in os.scandir(folder()) if entry.is_file()]
    for _, entry in sorted(entries, key=lambda pair: pair[0])[: max(0, len(entries) - MOST_ENTRIES)]:
        Path(entry.path).unlink(missing_ok=True)
