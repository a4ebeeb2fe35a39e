"""What would make it fit: single changes of a question that has no answer, each found good by asking again.

A change is a value that can be applied to the question, so that what is printed is what was planned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from planner import changes
from planner.errors import InfeasibleError, InputError, NoSolutionInTimeError, PlanError
from planner.graph import LayerGraph
from planner.hardware import MAX_GPUS, Hardware
from planner.rules import Rules
from planner.units import GB, KB, MB, TB
from planner.workload import Workload

# Seconds after which what was found is told.
BUDGET_S = 20.0
# Prompts beyond this are shortened to multiples of the step.
_EXACT_TOKENS = 256
_STEP_TOKENS = 64
_MOST_MORE_GPUS = 8
# More loss than any table of sensitivities adds up to: precision is then bounded by memory alone.
_ANY_LOSS = 1e6

What = Literal[
    "never_on_disk", "contiguous", "never_across_nodes", "pins", "pinned", "cache", "prompt_tokens", "new_tokens",
    "batch_size", "dtypes", "memory", "gpus",
]  # fmt: skip
# By how little a person has to give up: first what was forbidden, then the work, then precision, then money.
_ORDER: dict[What, int] = {
    "never_on_disk": 0, "contiguous": 0, "never_across_nodes": 0, "pins": 1, "pinned": 2, "cache": 3,
    "prompt_tokens": 4, "new_tokens": 4, "batch_size": 4, "dtypes": 5, "memory": 6, "gpus": 7,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """One change with which a plan was found.

    what: the field of the rules or of the work that changes; "pinned" is the limit of pinned memory, "memory" the size
        of memories, "gpus" the number of GPUs.
    where: the memories that grow, the pins that go, or the GPU that the new ones are like.
    value: what the field becomes; of "memory" the bytes added to each, of "gpus" how many are added.
    text: the change in words.
    """

    what: What
    where: tuple[str, ...] = ()
    value: int | str | None = None
    text: str


class Asked(Protocol):
    """What is asked again: a `planner.question.Question`, or the like."""

    @property
    def report(self) -> Callable[[str], None]: ...

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> object: ...


class GraphQuestion:
    """A question of a graph that was given, not traced: its work stays as it is."""

    def __init__(self, graph: LayerGraph, workload: Workload, report: Callable[[str], None] = lambda text: None):
        self.graph, self.workload, self.report = graph, workload, report

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> object:
        """Return what `find` finds.

        Raises:
            InputError: other work than the graph's. InfeasibleError: nothing fits.
        """
        from planner.placement.solution import find

        if replace(workload, objective=self.workload.objective) != self.workload:
            raise InputError("the graph was made for other work; trace the model for this one")
        return find(self.graph, hardware, workload, rules)


def applied(fix: Fix, hardware: Hardware, workload: Workload, rules: Rules) -> tuple[Hardware, Workload, Rules]:
    """Return the question with the change made."""
    value: Any = fix.value
    if fix.what == "memory":
        hardware = changes.with_memory(hardware, fix.where, value)
    elif fix.what == "gpus":
        hardware = changes.with_more_gpus(hardware, fix.where[0], value)
    elif fix.what == "pinned":
        hardware = replace(hardware, pinned_limit_bytes=value)
    elif fix.what == "pins":
        rules = replace(rules, pins=tuple(pin for pin in rules.pins if f"{pin.layers}={pin.device}" not in fix.where))
    elif fix.what == "dtypes":
        rules = replace(rules, dtypes=(*rules.dtypes, value), quality_budget=max(rules.quality_budget, _ANY_LOSS))
    elif fix.what in ("never_on_disk", "contiguous", "never_across_nodes"):
        changed: dict[str, Any] = {fix.what: False}
        rules = replace(rules, **changed)
    else:
        changed = {fix.what: value}
        workload = replace(workload, **changed)
    return hardware, workload, rules


def with_fixes(
    error: InfeasibleError, question: Asked, hardware: Hardware, workload: Workload, rules: Rules
) -> InfeasibleError:
    """Return `error` with what would make its question fit, in `fixes` and as a note."""
    search = _Search(question, hardware, workload, rules, error, BUDGET_S)
    error.fixes, error.fixes_complete = search.run(), search.complete
    for line in lines(error):
        error.add_note(line)
    return error


def fixes(
    question: Asked, hardware: Hardware, workload: Workload, rules: Rules, error: InfeasibleError,
    *, budget_s: float = BUDGET_S,
) -> tuple[Fix, ...]:  # fmt: skip
    """Return single changes that make it fit, the smallest for a person first; each was asked again, and fits.

    Sizes and numbers are the smallest changes of their kind: sizes to three digits, long prompts to 64 tokens. After
    about `budget_s` seconds the list ends with what was found.
    """
    return _Search(question, hardware, workload, rules, error, budget_s).run()


def lines(error: InfeasibleError) -> list[str]:
    """Return the fixes of an error as lines for a person."""
    found = []
    if error.fixes:
        head = "this would make it fit" if len(error.fixes) == 1 else "any one of these would make it fit"
        found = [f"{head} (each was planned again):", *(f"  - {fix.text}" for fix in error.fixes)]
    if not error.fixes_complete:
        found.append("the time for looking ran out: other changes may do as well, or smaller ones")
    return found


class _TimeIsUpError(Exception):
    """The search's own signal; never leaves it."""


class _Search:
    def __init__(
        self, question: Asked, hardware: Hardware, workload: Workload, rules: Rules, error: InfeasibleError,
        budget_s: float,
    ):  # fmt: skip
        self.question, self.hardware, self.workload, self.rules = question, hardware, workload, rules
        if workload.objective in ("throughput", "max-context", "max-batch"):
            # These choose the work; here it is what was asked for at the least.
            self.workload = replace(workload, objective="latency")
        self.error = error
        self.shortfalls = error.shortfalls or {error.device: _missing(error)}
        self.ends = time.monotonic() + budget_s
        self.complete = True

    def run(self) -> tuple[Fix, ...]:
        """Return what was found, ordered; what needs no new trace is asked first."""
        found: list[Fix] = []
        asked = (
            self._permissions, self._pins, self._pinned, self._dtypes, self._memories,
            lambda: self._less("prompt_tokens"), lambda: self._less("batch_size"), lambda: self._less("new_tokens"),
            self._gpus, self._cache, self._all_alike,
        )  # fmt: skip
        for ask in asked:
            try:
                found += ask()
            except _TimeIsUpError:
                self.complete = False
        return tuple(sorted(found, key=self._size))

    def _size(self, fix: Fix) -> tuple[int, float]:
        """Return the order of a fix among others: its kind, and how large it is among those of its kind."""
        size = 0.0
        if fix.what in ("prompt_tokens", "new_tokens", "batch_size"):
            assert isinstance(fix.value, int)
            size = 1 - fix.value / getattr(self.workload, fix.what)
        elif isinstance(fix.value, int):
            size = fix.value * max(1, len(fix.where))
        return _ORDER[fix.what], size

    def _fits(self, fix: Fix) -> bool:
        return self._shortage(fix) == 0

    def _shortage(self, fix: Fix) -> int | None:
        """Return 0 where the change makes it fit, else the bytes that are short; None where that is not known.

        Raises:
            _TimeIsUpError: there is no time left to ask.
        """
        left = self.ends - time.monotonic()
        if left <= 0:
            raise _TimeIsUpError
        hardware, workload, rules = applied(fix, self.hardware, self.workload, self.rules)
        limit = left if rules.time_limit_s is None else min(left, rules.time_limit_s)
        self.question.report("looking for what would make it fit")
        try:
            self.question.plan(hardware, workload, replace(rules, time_limit_s=limit))
        except InfeasibleError as error:
            return max(1, _missing(error))
        except NoSolutionInTimeError:
            self.complete = False
            return None
        except PlanError:
            return None
        return 0

    def _kept(self, *candidates: Fix) -> list[Fix]:
        return [fix for fix in candidates if self._fits(fix)]

    # What the rules forbid

    def _permissions(self) -> list[Fix]:
        words: dict[What, str] = {
            "never_on_disk": "let weights wait on disk (without --never-disk)",
            "contiguous": "let devices run layers that are not neighbours (without --contiguous)",
            "never_across_nodes": "use more than one node (without --one-node)",
        }
        said = [Fix(what=what, text=text) for what, text in words.items() if getattr(self.rules, what)]
        return self._kept(*said)

    def _pins(self) -> list[Fix]:
        names = list(dict.fromkeys(f"{pin.layers}={pin.device}" for pin in self.rules.pins))
        found = self._kept(*(Fix(what="pins", where=(name,), text=f"without --pin {name}") for name in names))
        if found or len(names) < 2:
            return found
        return self._kept(Fix(what="pins", where=tuple(names), text="without any --pin"))

    def _pinned(self) -> list[Fix]:
        limit = self.hardware.pinned_limit_bytes
        if limit is None:
            return []

        def more(added: int) -> Fix:
            words = f"{_words(added)} more host memory that may be pinned (the limit is {_words(limit, exact=True)})"
            return Fix(what="pinned", value=limit + added, text=words)

        host = sum(self.hardware.pool(device.pool).usable_bytes for device in self.hardware.hosts)
        if not self._fits(more(_figure(_index(host)))):
            return []
        return self._least(more, self.shortfalls.get("pinned", host))

    # What the machine lacks

    def _memories(self) -> list[Fix]:
        found = []
        for names in changes.alike(self.hardware, self.rules):
            missing = min((self.shortfalls[name] for name in names if name in self.shortfalls), default=None)
            if missing is not None:
                where = next(name for name in names if self.shortfalls.get(name) == missing)
                found += self._least(partial(self._more, (where,), names), missing)
        return found

    def _all_alike(self) -> list[Fix]:
        """Return the fix by more memory on every GPU of a kind, where there are several of that kind."""
        found = []
        gpus = {device.pool for device in self.hardware.gpus}
        for names in changes.alike(self.hardware, self.rules):
            if len(names) < 2 or not gpus.issuperset(names):
                continue
            short = [self.shortfalls[name] for name in names if name in self.shortfalls]
            guess = min(short, default=max(1, _missing(self.error))) // len(names)
            found += self._least(partial(self._more, names, names), guess)
        return found

    def _more(self, where: tuple[str, ...], names: tuple[str, ...], added: int) -> Fix:
        """Return the fix by `added` bytes in each memory of `where`, which are some of the alike `names`."""
        size, name = _words(added), where[0]
        if name in {self.hardware.host(name), self.hardware.disk(name)}:
            node = self.hardware.node(name)
            kind, option = ("disk", "--disk") if name == self.hardware.disk(name) else ("host memory", "--ram")
            text = f"{size} more {kind}{f' of {node}' if node else ''} ({option})"
        elif len(where) > 1:
            text = f"{size} more on each of {', '.join(where)}"
        else:
            text = f"{size} more on {'any one of ' if len(names) > 1 else ''}{', '.join(names)}"
        return Fix(what="memory", where=where, value=added, text=text)

    def _least(self, more: Callable[[int], Fix], guess: int) -> list[Fix]:
        """Return the fix of the smallest figure of three digits that fits, or none; `guess` is where to look."""
        low, high = 0, _index(max(1, guess))
        # Far more than is missing never fits where it is not this memory that lacks.
        for jump in (1, 10, 100, 300, 900, 0):
            if self._fits(more(_figure(high))):
                break
            if jump == 0:
                return []
            low, high = high, high + jump
        middle = high - 1
        try:
            while high - low > 1:
                if self._fits(more(_figure(middle))):
                    high = middle
                else:
                    low = middle
                middle = (low + high) // 2
        except _TimeIsUpError:
            self.complete = False
        return [more(_figure(high))]

    def _gpus(self) -> list[Fix]:
        found = []
        pools = {device.pool: device.name for device in self.hardware.gpus}
        room = min(_MOST_MORE_GPUS, MAX_GPUS - len(self.hardware.gpus))
        for names in changes.alike(self.hardware, self.rules):
            if names[0] not in pools:
                continue
            like = pools[names[0]]
            product = self.hardware.device(like).product

            def more(count: int, like: str = like, product: str = product) -> Fix:
                many = "another GPU" if count == 1 else f"{count} more GPUs"
                return Fix(what="gpus", where=(like,), value=count, text=f"{many} like {like} ({product})")

            low, high = 0, min(1, room)
            while high and not self._fits(more(high)):
                low, high = high, min(2 * high, room) if high < room else 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._fits(more(middle)) else (middle, high)
            if high:
                found.append(more(high))
        return found

    # What the work asks for

    def _dtypes(self) -> list[Fix]:
        for dtype in ("int8", "nf4"):
            if dtype not in self.rules.dtypes:
                text = f"store weights in {dtype} where that helps (--dtype, --quality-budget)"
                found = self._kept(Fix(what="dtypes", value=dtype, text=text))
                if found:
                    return found
        return []

    def _cache(self) -> list[Fix]:
        if self.workload.cache == "fp8" or self.workload.decode_steps == 0:
            return []
        return self._kept(Fix(what="cache", value="fp8", text="keep keys and values in 8 bits (--cache fp8)"))

    def _less(self, what: Literal["prompt_tokens", "new_tokens", "batch_size"]) -> list[Fix]:
        """Return the fix of the largest smaller value that fits, if any: multiples of 64 tokens, or exact if small.

        Traces are dear: where two values that do not fit are known, the next asked is where their shortages would
        meet zero; every third halves what is left.
        """
        asked: int = getattr(self.workload, what)
        words = {
            "prompt_tokens": "a prompt of at most {:,} tokens (--prompt {})",
            "new_tokens": "at most {:,} new tokens (--new-tokens {})",
            "batch_size": "a batch of at most {:,} (--batch {})",
        }
        if asked == 1 or (what == "new_tokens" and asked <= self.workload.prompt_tokens):
            return []

        def of(value: int) -> Fix:
            return Fix(what=what, value=value, text=words[what].format(value, value))

        step = 1 if what == "batch_size" or asked <= _EXACT_TOKENS else _STEP_TOKENS
        low, high = 1, -(-asked // step)
        if not self._fits(of(step)):
            if step == 1 or not self._fits(of(1)):
                return []
            step, high = 1, step
        short = {high: max(1, _missing(self.error))}
        count = 0
        try:
            while high - low > 1:
                guess = (low + high) // 2 if count % 3 == 2 else _crossing(short, low, high)
                count += 1
                shortage = self._shortage(of(guess * step))
                if shortage == 0:
                    low = guess
                else:
                    high = guess
                    if shortage is not None:
                        short[guess] = shortage
        except _TimeIsUpError:
            self.complete = False
        return [of(low * step)]


def _missing(error: InfeasibleError) -> int:
    return error.needed_bytes - error.available_bytes


def _crossing(short: dict[int, int], low: int, high: int) -> int:
    """Return where shortages would meet zero, strictly between `low` and `high`; the middle where that is not known."""
    known = sorted(short.items())[:2]
    if len(known) == 2:
        (near, less), (far, more) = known
        if more > less:
            return min(max(near - -(-less * (far - near) // (more - less)), low + 1), high - 1)
    return (low + high) // 2


def _index(nbytes: int) -> int:
    """Return the position of the least figure of three digits that is not below `nbytes`."""
    zeros = max(0, len(str(nbytes)) - 3)
    unit: int = 10**zeros
    digits = -(-nbytes // unit)
    # Of each power of ten there are the 900 figures from 100 to 999; below them, every number.
    return digits + 900 * zeros


def _figure(index: int) -> int:
    """Return the figure at a position: 1, 2, ... 999, 1000, 1010, ... 9990, 10000, 10100, ..."""
    if index < 1000:
        return index
    zeros, digits = divmod(index - 100, 900)
    scale: int = 10**zeros
    return (digits + 100) * scale


def _words(nbytes: int, *, exact: bool = False) -> str:
    """Return a figure of three digits without loss: "1.24 GB"; `exact` is for others, to three digits."""
    if exact and nbytes:
        nbytes = _figure(_index(nbytes))
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes} B"
