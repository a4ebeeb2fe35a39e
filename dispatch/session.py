"""The calls of one dispatched model: one at a time, held to what was planned, under the plan that is in force."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dispatch.calls import Call, call_of
from dispatch.limits import Limits

# Dispatches the model by a plan for a larger call, and returns the session of that.
Again = Callable[[Call], "Session"]


class Session:
    """Slots, and the parameters that are views of them, serve one call at a time; other threads wait.

    begin, end: what else is done before and after a call. again: plans for a call that is larger than planned; the
    session then hands everything over, also calls of threads that wait in it.
    """

    def __init__(self, limits: Limits, begin: Callable[[], None], end: Callable[[], None], again: Again):
        self.limits = limits
        self._begin: Callable[[], None] | None = begin
        self._end: Callable[[], None] | None = end
        self._again = again
        self._lock = threading.RLock()
        self._next: Session | None = None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Wait for other calls, and prepare for this one."""
        self._lock.acquire()
        try:
            if self._next is None and self.limits.begin(call_of(args, kwargs)):
                # What holds memory under the old plan is let go before the new one takes any.
                self._begin = self._end = None
                self._next = self._again(call_of(args, kwargs))
            if self._next is not None:
                return self._next.begin(args, kwargs)
            if self._begin is not None:
                self._begin()
        except BaseException:
            self._lock.release()
            raise
        return args, kwargs

    def end(self) -> None:
        """Let the next call begin."""
        try:
            if self._next is not None:
                self._next.end()
            elif self._end is not None:
                self._end()
        finally:
            self._lock.release()

    def failed(self, error: BaseException) -> BaseException | None:
        """Return what to raise in place of an error, or None."""
        return self.limits.explained(error) if self._next is None else self._next.failed(error)
