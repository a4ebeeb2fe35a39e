"""Ctrl-C wherever the interpreter is."""

from __future__ import annotations

import signal
from collections.abc import Callable

# Again, should one come where Python can only report it, as in a weak reference's callback.
_AGAIN_SECONDS = 0.2


def interrupt(call: Callable[[], object], *, times: int) -> None:
    """Let a timer interrupt a loop of calls so many times, each a little later; no loop ends otherwise."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00015 * number, _AGAIN_SECONDS)
                while True:
                    call()
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
