"""What a benchmark's JSON says of where it was run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess


def describe() -> dict[str, object]:
    """Return the machine, versions and commit of this run."""
    packages = ("loadplan", "torch", "transformers", "ortools", "accelerate")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        words = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
