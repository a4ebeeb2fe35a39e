"""The calls of one dispatched model: one at a time, held to what was planned, under the plan that is in force."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dispatch import hooks
from dispatch.calls import call_of
from dispatch.limits import Limits
from dispatch.replan import larger_plan
from planner.errors import InputError
from planner.plan import Plan

# Dispatches the model by another plan, and returns the session of that.
Dispatch = Callable[[Plan], "Session"]
Begin = Callable[[Iterable[Any]], None]


class AsItWasError(InputError):
    """A larger plan cannot take the place of the one in force, which stays in force."""


class Session:
    """Slots, and the parameters that are views of them, serve one call at a time; other threads wait.

    limits: None where nothing was planned for.
    lock: held by the thread that calls, and by whoever wants no calls meanwhile.
    begin, end: what else is done before a call, with what it is given, and after it. recover: mends what an interrupted
    call left behind. dispatch: puts the model under a larger plan; the session then hands over all calls, also of
    threads that wait.
    """

    def __init__(
        self,
        limits: Limits | None,
        *,
        begin: Begin,
        end: Callable[[], None],
        recover: Callable[[], None],
        dispatch: Dispatch | None,
        lock: threading.RLock,
    ):
        self.limits = limits
        # Not where a plan has taken over.
        self._around: tuple[Callable[[], None], Begin, Callable[[], None]] | None = (recover, begin, end)
        self._dispatch = dispatch
        self._lock = lock
        self._next: Session | None = None
        self._own_generate: Any = None
        self._generate: Any = None

    def serve(self, module: torch.nn.Module) -> None:
        """Let every call of a module pass through here, until `hooks.detach`; and `generate`, until `leave`."""
        hooks.attach_around(module, self)
        generate = getattr(module, "generate", None)
        if not callable(generate):
            return
        self._own_generate = vars(module).get("generate")

        @functools.wraps(generate)
        def explaining(*args: Any, **kwargs: Any) -> Any:
            try:
                return generate(*args, **kwargs)
            except torch.OutOfMemoryError as exc:
                limits = self._last().limits
                if limits is None or isinstance(exc.__cause__, torch.OutOfMemoryError):
                    raise  # nothing was planned for, or it was explained in a call of forward
                raise limits.explained(exc, between_calls=True) from exc

        self._generate = explaining
        setattr(module, "generate", explaining)  # noqa: B010  (a module's attributes are typed as its own parts)

    def leave(self, module: torch.nn.Module) -> None:
        """Give a module its own `generate` back, unless somebody gave it another since."""
        own = self.own_generate(module)
        vars(module).pop("generate", None)
        if own is not None:
            module.generate = own

    def own_generate(self, module: torch.nn.Module) -> Any:
        """Return the `generate` that a module has of its own, under the session's; None where it is its class's."""
        current = vars(module).get("generate")
        return self._own_generate if self._generate is not None and current is self._generate else current

    def _last(self) -> Session:
        """Return the session whose plan is in force."""
        return self if self._next is None else self._next._last()

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a call returns, once those of other threads are done."""
        is_outermost = not self._lock._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks it
        # A lock of the interpreter's own: it is given back wherever an interrupt comes.
        with self._lock:
            call = call_of(args, kwargs)
            if self._next is None and self.limits is not None and self.limits.begin(call):
                # What holds memory under the old plan is let go before the new one takes any.
                larger = larger_plan(self.limits.plan, module, call)
                around, self._around = self._around, None
                assert self._dispatch is not None
                try:
                    self._next = self._dispatch(larger)
                except AsItWasError:
                    self._around = around
                    raise
            if self._next is not None:
                return self._next.run(module, forward, args, kwargs)
            if self._around is None:
                raise InputError("dispatching this model by a larger plan has failed: call dispatch.apply again")
            recover, begin, end = self._around
            if is_outermost:
                recover()
            begin((*args, *kwargs.values()))
            try:
                return forward(*args, **kwargs)
            except torch.OutOfMemoryError as exc:
                if self.limits is None:
                    raise
                raise self.limits.explained(exc) from exc
            except BaseException:
                if is_outermost:
                    recover()
                raise
            finally:
                end()
