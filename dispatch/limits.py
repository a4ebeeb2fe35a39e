"""More than was planned: what it would take, said before a call begins; and what is said where memory runs out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch

from dispatch.calls import Call
from planner.errors import InputError, PlanMismatchError
from planner.growth import Size, grown_bytes
from planner.plan import Plan
from planner.units import format_bytes

_AHEAD_TOKENS = 256
OnExceed = Literal["warn", "refuse", "replan"]


class Limits:
    """What one plan's model may be called with.

    on_exceed: "warn" tells once of calls larger than planned, and refuses those that cannot fit by the plan's own
        figures; "refuse" refuses all that are larger; "replan" says which the plan should be made for.
    """

    def __init__(self, plan: Plan, targets: Mapping[str, torch.device], on_exceed: OnExceed):
        if on_exceed not in get_args(OnExceed):
            raise InputError(f"on_exceed is {on_exceed!r}; it must be one of {', '.join(get_args(OnExceed))}")
        self.plan, self.targets, self.on_exceed = plan, targets, on_exceed
        self._planned = Size.of(plan)
        # Sizes beyond the plan that are known to fit.
        self._known = self._planned
        self._call: Call | None = None
        self._told = False

    def begin(self, call: Call) -> bool:
        """Tell of a call that is larger than planned; return whether to plan again for it.

        Raises:
            PlanMismatchError: it cannot fit, or is not to be tried.
        """
        self._call = call
        size = Size(rows=call.rows, tokens=call.new_tokens, context_tokens=call.context_tokens)
        if self._planned.holds(size):
            return False
        if self.on_exceed == "replan" and call.past_tokens == 0:
            return True
        if self.on_exceed != "refuse" and self._known.holds(size):
            return False
        needed = grown_bytes(self.plan, size)
        short = self._short(needed)
        if short or self.on_exceed == "refuse":
            raise PlanMismatchError(f"{self._larger(size)}{self._takes(needed, short)}. {_TRY.format(**_fields(size))}")
        # A context grows by one token each call: further ones need not be asked for one by one.
        ahead = replace(size, context_tokens=size.context_tokens + _AHEAD_TOKENS)
        self._known = size if self._short(grown_bytes(self.plan, ahead)) else ahead
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self._larger(size)}: it may run out of memory{self._takes(needed, short)}. "
                f"{self._chunked(size) or _TRY.format(**_fields(size))}",
                stacklevel=3,
            )
        return False

    def explained(self, error: torch.OutOfMemoryError, *, between_calls: bool = False) -> torch.OutOfMemoryError:
        """Return an error of the same kind that says what was predicted where memory ran out.

        between_calls: not in a call of forward, but in what `generate` does around it.
        """
        names = self._short_of(str(error))
        said = [f"{' or '.join(names)} ran out of memory"]
        size = self._planned
        if self._call is not None and self._call.rows:
            call = self._call
            size = Size(rows=call.rows, tokens=call.new_tokens, context_tokens=call.context_tokens)
            said[0] += f" {'in generate, after' if between_calls else 'in'} a call of {_words(size)}"
        is_larger = not self._planned.holds(size)
        grown = grown_bytes(self.plan, size)
        said += [self._figures(name, grown[name] if is_larger else None) for name in names]
        if is_larger:
            said.append(f"The plan is for {_words(self._planned)}: {_TRY.format(**_fields(size))}")
        else:
            said.append(
                "The call is no larger than planned: either others use that memory too, or the prediction is off. "
                "dispatch.measure and plan.check say by how much; plan with max_memory that is less by it"
            )
        return type(error)(f"{'. '.join(said)}. What was raised: {error}")

    def _short(self, needed: Mapping[str, int]) -> dict[str, int]:
        """Return what each memory lacks, where it does."""
        room = {pool.name: pool.usable_bytes for pool in self.plan.hardware.pools}
        return {name: nbytes - room[name] for name, nbytes in needed.items() if nbytes > room[name]}

    def _figures(self, name: str, grown: int | None) -> str:
        """Return what is predicted of a device, and what torch and its driver count there now."""
        words = []
        prediction = self.plan.prediction
        if prediction is not None and name in prediction.peak_bytes:
            words.append(
                f"{name} was predicted to hold {format_bytes(prediction.peak_bytes[name])} at most, as planned"
            )
        if grown is not None:
            words.append(f"{format_bytes(grown)} at least in this call")
        capacity = self.plan.hardware.pool(self.plan.hardware.device(name).pool).usable_bytes
        words.append(f"the plan has {format_bytes(capacity)} for it")
        device = self.targets[name]
        if device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(device)
            words.append(
                f"torch holds {format_bytes(torch.cuda.memory_reserved(device))}, at most "
                f"{format_bytes(torch.cuda.max_memory_reserved(device))} until now, and "
                f"{format_bytes(free)} of {format_bytes(whole)} are free"
            )
        return ", ".join(words)

    def _short_of(self, text: str) -> list[str]:
        """Return the plan's devices that an error speaks of, or all that it could."""
        found = [name for name in self.targets if re.search(rf"(?<![\w/]){re.escape(name)}(?!\d)", text)]
        by_number = re.search(r"\bGPU (\d+)\b", text)
        if by_number is not None:
            index = int(by_number[1])
            found = [n for n, d in self.targets.items() if d.type == "cuda" and (d.index or 0) == index] or found
        return found or list(self.targets)

    def _larger(self, size: Size) -> str:
        return f"this call has {_words(size)}; the plan is for {_words(self._planned)}"

    def _takes(self, needed: Mapping[str, int], short: Mapping[str, int]) -> str:
        """Return what the memory that is shortest, or that most is taken of, would hold."""
        pools = {name: self.plan.hardware.pool(name).usable_bytes for name in needed}
        used = {name: nbytes / max(1, pools[name]) for name, nbytes in needed.items() if name in self.targets}
        name = max(short, key=lambda each: short[each]) if short else max(used, key=lambda each: used[each])
        fits = f"which is {format_bytes(short[name])} too much" if short else "which fits"
        return (
            f". {name} would hold {format_bytes(needed[name])} at least, of {format_bytes(pools[name])}, {fits} by the "
            "plan's figures"
        )

    def _chunked(self, size: Size) -> str | None:
        """Return what to do about a prompt that was to come in chunks."""
        if self.plan.workload.prefill_chunk is None or size.tokens <= self._planned.tokens:
            return None
        return f"Call generate with prefill_chunk_size={self._planned.tokens}"


_TRY = (
    "Call it with fewer rows or tokens, plan for this work (batch_size={rows}, prompt_tokens={tokens} or more), or "
    'dispatch.apply(..., on_exceed="replan")'
)


def _fields(size: Size) -> dict[str, int]:
    return {"rows": size.rows, "tokens": max(size.tokens, 1)}


def _words(size: Size) -> str:
    rows = f"{size.rows} row" + ("" if size.rows == 1 else "s")
    return f"{rows}, {size.tokens} new tokens in each and {size.context_tokens} tokens of context"
