"""One line on stderr that says what is being done, where someone can see it."""

from __future__ import annotations

import os
import shutil
import sys
from types import TracebackType


class Progress:
    """A single updating line on stderr; nothing at all unless stderr is a terminal.

    Used as a context: the line is gone when it ends, whatever happened inside.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def report(self, text: str) -> None:
        """Show `text` instead of what was shown before."""
        if self._shown:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{f'plan: {text} ...'[:width]}")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
