"""Text for a terminal of 80 columns: wrapping, tables, colour, and how numbers are said."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

WIDTH = 80
_STYLES = {"bold": "1", "dim": "2", "good": "1;32", "bad": "1;31"}


def clean(text: str) -> str:
    """Return `text` on one line, with "?" for what could steer a terminal: names in a plan may come from anyone."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class Page:
    """Lines of text, none wider than WIDTH; a line has one style or none, so colour never changes a width."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._lines: list[str] = []

    def line(self, text: str = "", style: str | None = None) -> None:
        """Add one line, cut where it does not fit; what could steer a terminal is replaced."""
        plain = clean(text).rstrip()
        plain = plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 1]}…"
        self._lines.append(f"\x1b[{_STYLES[style]}m{plain}\x1b[0m" if self._color and style and plain else plain)

    def paragraph(self, text: str, *, first: str = "", rest: str | None = None, style: str | None = None) -> None:
        """Add wrapped text: `first` begins its first line, `rest` (spaces of that width) the others."""
        rest = " " * len(first) if rest is None else rest
        for number, row in enumerate(fold(text, WIDTH - max(len(first), len(rest))) or [""]):
            self.line((first if number == 0 else rest) + row, style)

    def heading(self, text: str) -> None:
        self.line()
        self.line(text, "bold")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def fold(text: str, width: int) -> list[str]:
    """Return `text` in lines of at most `width`, cut at spaces, else behind . / _ or -, else anywhere."""
    lines = []
    for line in textwrap.wrap(clean(text), width, break_long_words=False, break_on_hyphens=False):
        while len(line) > width:
            cut = max(line.rfind(mark, 0, width) for mark in "./_-") + 1 or width
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line)
    return lines


def column_widths(rows: Iterable[Sequence[str]], *, least: Mapping[int, int], total: int, gap: int) -> list[int]:
    """Return each column's width, the widest cell's, unless the table would then be wider than `total`.

    Then the columns of `least` narrow, one after the other to the width given there, and after that the
    widest of them; others keep their width.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    over = sum(widths) + gap * (len(widths) - 1) - total
    for index, width in least.items():
        cut = max(0, min(over, widths[index] - width))
        widths[index] -= cut
        over -= cut
    while over > 0:
        widest = max(least, key=lambda index: widths[index])
        widths[widest] = max(1, widths[widest] - 1)
        over -= 1
    return widths


def parameters_words(count: int) -> str:
    """Return a number of parameters in words: "46.7 billion", "124 million"."""
    for unit, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            value = count / unit
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {word}"
    return str(count)
