"""What can go wrong, as a tree. Each class owns the exit code of the `plan` command.

    PlanError                     1   (never raised itself)
    ├── InputError                2   model, hardware, workload, checkpoint, or a path that cannot be used
    ├── InfeasibleError           3   no placement fits; carries where, how much, and the smallest fix
    ├── NoSolutionInTimeError     4   the search was cut off before it found any placement
    ├── PlanFormatError           5   a file is not a Plan, or not of a version that is known
    ├── PlanMismatchError         5   the Plan is for another model or other devices
    └── TraceError                6   the model could not be traced, or is of a kind that is not carried yet

An exit code of 1 from the command means a fault of our own, 130 an interrupt.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.fixes import Fix


class PlanError(Exception):
    """Root of every error raised on purpose. `str(error)` is one message for a person."""

    exit_code: ClassVar[int] = 1

    def as_dict(self) -> dict[str, object]:
        """Return the error as JSON-ready data: its class, message, exit code and own fields."""
        fields = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {"error": type(self).__name__, "message": str(self), "exit_code": self.exit_code, **fields}


class InputError(PlanError):
    """Something given by the caller cannot be used."""

    exit_code = 2


class InfeasibleError(PlanError):
    """No placement satisfies the constraints.

    Attributes:
        device: the memory that is short, as the Plan names it ("cuda:0", "cpu", "disk").
        needed_bytes: the least capacity of `device` with which everything would fit, others unchanged.
        available_bytes: the capacity that `device` has.
        smallest_fix: what to change, in words.
        shortfalls: by memory, the bytes it lacks where it alone may grow; memories whose growth helps, no others.
        fixes: single changes with which a plan was found, the smallest first.
        fixes_complete: whether all changes that are thought of were tried; False where the time for it ran out.
    """

    exit_code = 3

    def __init__(
        self,
        *,
        device: str,
        needed_bytes: int,
        available_bytes: int,
        smallest_fix: str,
        message: str,
        shortfalls: Mapping[str, int] | None = None,
    ):
        super().__init__(message)
        self.device = device
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.smallest_fix = smallest_fix
        self.shortfalls = dict(shortfalls or {})
        self.fixes: tuple[Fix, ...] = ()
        self.fixes_complete = True

    def as_dict(self) -> dict[str, object]:
        """Return the error as JSON-ready data; shortfalls and fixes where they were looked for."""
        told = super().as_dict()
        told["fixes"] = [asdict(fix) for fix in self.fixes]
        if not self.shortfalls:
            del told["shortfalls"]
        if not self.fixes and self.fixes_complete:
            del told["fixes"], told["fixes_complete"]
        return told


class NoSolutionInTimeError(PlanError):
    """The solver's limit was reached before any placement was found; one may exist."""

    exit_code = 4


class PlanFormatError(PlanError):
    """A Plan file is damaged, or its schema version is unknown."""

    exit_code = 5


class PlanMismatchError(PlanError):
    """The Plan does not belong to the model, checkpoint or devices that it was used with."""

    exit_code = 5


class TraceError(PlanError):
    """The model could not be traced, or needs something that is not carried yet."""

    exit_code = 6
