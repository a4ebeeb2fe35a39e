"""Sizes and times as people write and read them. The only place that knows 10**9 and 2**30."""

from __future__ import annotations

import math
import re

from planner.errors import InputError

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {
    "": 1, "b": 1,
    "k": KB, "kb": KB, "m": MB, "mb": MB, "g": GB, "gb": GB, "t": TB, "tb": TB,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTkmgt])(?:[Bb]it|b)\s*")
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B|[KMGT]iB|[KMGT]bit)(?:/s)?\s*")
_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([GTP])(?:FLOPS?|FLOP/s)?\s*")


def parse_bytes(text: str | int, *, what: str = "a size") -> int:
    """Return the number of bytes that `text` names: "24GB" is 24 * 10**9, "24GiB" 24 * 2**30, "512" bytes.

    Raises:
        InputError: not a size, or negative.
    """
    if isinstance(text, bool):
        raise InputError(f"{what} must be a size such as 24GB or 20GiB, not {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise InputError(f"{what} must not be negative, and is {text}")
        return text
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        if text.strip().startswith("-"):
            raise InputError(f"{what} must not be negative, and is {text!r}")
        raise InputError(
            f"{what} must be a number and a unit (B, MB, GB, TB, or MiB, GiB, TiB), such as 24GB; got {text!r}"
        )
    whole, _, fraction = match[1].partition(".")
    digits = len(fraction)
    scale: int = 10**digits
    return int(whole + fraction) * unit // scale


def parse_memory(given: str | int | float, *, what: str = "a size") -> int:
    """Return the bytes that Accelerate's users mean: as `parse_bytes`, but bits where a decimal unit ends in a small b
    ("10Gb", "10gb", also "10Gbit"). Fractions of a byte are left out.

    Raises:
        InputError: not a size, or negative.
    """
    if isinstance(given, str) and (match := _BITS.fullmatch(given)) is not None:
        return parse_bytes(f"{match[1]}{match[2]}B", what=what) // 8
    return parse_bytes(math.floor(given) if isinstance(given, float) else given, what=what)


def parse_rate(text: str | int, *, what: str = "a rate") -> int:
    """Return the bytes per second that `text` names: "12.5GB/s" or "12.5GB", and "100Gbit/s" or "100Gbit" in bits.

    "Gb" means bits to some and bytes to others, and is refused.

    Raises:
        InputError: not a rate, or zero or less.
    """
    if isinstance(text, str) and (match := _RATE.fullmatch(text)) is not None:
        unit = match[2]
        rate = parse_bytes(match[1] + unit.replace("bit", "B"), what=what) // (8 if unit.endswith("bit") else 1)
    elif isinstance(text, int) and not isinstance(text, bool):
        rate = text
    else:
        raise InputError(f"{what} must be bytes a second such as 12.5GB/s, or bits such as 100Gbit/s; got {text!r}")
    if rate < 1:
        raise InputError(f"{what} must be more than nothing, and is {text!r}")
    return rate


def parse_flops(text: str | int, *, what: str = "a rate") -> int:
    """Return the FLOP/s that `text` names: "2TFLOP/s", "2TFLOPS", "500G".

    Raises:
        InputError: not such a rate, or zero or less.
    """
    if isinstance(text, str) and (match := _FLOPS.fullmatch(text)) is not None:
        rate = parse_bytes(match[1] + match[2].replace("P", "T"), what=what) * (1000 if match[2] == "P" else 1)
    elif isinstance(text, int) and not isinstance(text, bool):
        rate = text
    else:
        raise InputError(f"{what} must be a number and GFLOP/s, TFLOP/s or PFLOP/s, such as 2TFLOP/s; got {text!r}")
    if rate < 1:
        raise InputError(f"{what} must be more than nothing, and is {text!r}")
    return rate


def format_bytes(count: int) -> str:
    """Return `count` bytes in decimal units, "23.4 GB"; small counts as "512 B"."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if abs(count) >= unit:
            value = count / unit
            digits = 1 if value >= 100 else 2
            return f"{value:,.{digits}f} {name}"
    return f"{count} B"


def format_ns(duration_ns: int) -> str:
    """Return a duration of `duration_ns` nanoseconds with three digits that matter: "4.71 s", "81.0 ms"."""
    for unit, name in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if duration_ns >= unit:
            value = duration_ns / unit
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:,.{digits}f} {name}"
    return f"{duration_ns} ns"


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
