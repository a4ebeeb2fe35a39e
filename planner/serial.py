"""Frozen dataclasses to canonical JSON and back, strictly: no key may be missing, unknown or of a wrong type; and files
that are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import InputError, PlanFormatError

T = TypeVar("T")
# Metadata of a field that is left out of JSON where it holds its default: documents from before it stay as they are.
OMITTED = {"omitted": True}


def encode(value: Any) -> Any:
    """Return `value` (dataclasses, tuples, dicts, scalars) as JSON-ready data; field order is kept."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: encode(here) for field, here in held if not (_may_lack(field) and here == field.default)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in sorted(value.items())}
    return value


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: compact scalars, one space of indent, no NaN, a final newline."""
    return json.dumps(encode(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _may_lack(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("omitted"))


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def decode(cls: type[T], data: Any, *, where: str = "plan", defaults: bool = False) -> T:
    """Build a `cls` from JSON data; with `defaults`, what has a default may be missing.

    Raises:
        PlanFormatError: a key is missing, unknown, or holds another type; the message says where.
    """
    return typing.cast(T, _decode(cls, data if not defaults else _filled(cls, data), where))


def _filled(kind: Any, data: Any) -> Any:
    """Return JSON data of a dataclass with the defaults of what it leaves out, all the way down."""
    if typing.get_origin(kind) is tuple and isinstance(data, list):
        return [_filled(typing.get_args(kind)[0], entry) for entry in data]
    if not (dataclasses.is_dataclass(kind) and isinstance(data, dict)):
        return data
    hints = _fields(typing.cast(type, kind))
    defaults = {
        field.name: encode(field.default)
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    return {**defaults, **{name: _filled(hints.get(name), value) for name, value in data.items()}}


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(kind, data, where)
    if origin is tuple:
        (item, _) = typing.get_args(kind)
        if not isinstance(data, list):
            raise PlanFormatError(f"{where} must be a list, and is {_name(data)}")
        return tuple(_decode(item, entry, f"{where}[{i}]") for i, entry in enumerate(data))
    if origin is dict:
        (_, item) = typing.get_args(kind)
        if not isinstance(data, dict):
            raise PlanFormatError(f"{where} must be an object, and is {_name(data)}")
        return {key: _decode(item, entry, f"{where}.{key}") for key, entry in data.items()}
    if kind is Any:
        return data
    if origin is typing.Literal:
        if data not in typing.get_args(kind):
            raise PlanFormatError(f"{where} must be one of {typing.get_args(kind)}, and is {data!r}")
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise PlanFormatError(f"{where} must be {kind.__name__}, and is {_name(data)}")
    return data


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise PlanFormatError(f"{where} must be an object, and is {_name(data)}")
    fields = _fields(kind)
    may_lack = {field.name for field in dataclasses.fields(kind) if _may_lack(field)}
    missing = [name for name in fields if name not in data and name not in may_lack]
    unknown = [name for name in data if name not in fields]
    if missing or unknown:
        words = [f"lacks {', '.join(missing)}"] if missing else []
        words += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise PlanFormatError(f"{where} {' and '.join(words)}")
    return kind(**{name: _decode(hint, data[name], f"{where}.{name}") for name, hint in fields.items() if name in data})


def _decode_union(kind: Any, data: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if data is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    errors = []
    for option in rest:
        try:
            return _decode(option, data, where)
        except PlanFormatError as error:
            errors.append(error)
    raise errors[-1]


def _name(data: Any) -> str:
    return "null" if data is None else type(data).__name__


def read_text(path: str | Path, *, what: str) -> str:
    """Return the text of a file.

    Raises:
        InputError: it cannot be read, or is no text; `what` says in the message what it was to be.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise InputError(f"cannot read the {what} {path}: {exc}") from exc


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` under a temporary name and rename it, so that readers see all of it or the old file.

    Raises:
        InputError: the folder or file cannot be written.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {path}: it is there, and is not a file")
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as exc:
        raise InputError(f"cannot write {target}: {exc.strerror or exc}") from exc
