"""Actions on lanes, which do one thing at a time, and on resources that lanes share. Integer nanoseconds.

An action starts when the action before it on each of its lanes and everything that it waits for have ended: each lane
takes its actions in the order they were issued. It draws so many bytes per second from shared resources while it runs.
Where all together ask for more than a resource has, each of them is slowed by the same factor; an action that draws on
several is slowed by the scarcest. Events come in the order of their instants, and of one instant in the order in which
their actions were issued, so that the same actions always give the same times.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["run", "launch", "copy", "read", "hop"]
# Work left is counted in parts of a nanosecond at full speed, so that slowed actions stay exact integers.
_FULL_SPEED = 2**20


@dataclass(slots=True, eq=False)
class Action:
    """Something that occupies lanes for a time. draws: (resource, bytes per second at full speed).

    start_ns, end_ns: None until they are known.
    """

    number: int
    kind: Kind
    label: str
    lanes: tuple[str, ...]
    call: int
    draws: tuple[tuple[str, int], ...]
    left: int
    waits_for: int = 0
    followers: list[Action] = field(default_factory=list)
    start_ns: int | None = None
    end_ns: int | None = None
    speed: int = _FULL_SPEED
    since_ns: int = 0
    version: int = 0


After = tuple[Action, ...]


class Engine:
    """Issues actions and settles when each begins and ends. capacities: of shared resources, in bytes per second."""

    def __init__(self, capacities: Mapping[str, int] | None = None) -> None:
        self.clock_ns = 0
        self._capacities = dict(capacities or {})
        self._asked = dict.fromkeys(self._capacities, 0)
        self._speeds = dict.fromkeys(self._capacities, _FULL_SPEED)
        self._drawing: dict[str, dict[int, Action]] = {name: {} for name in self._capacities}
        self._last: dict[str, Action] = {}
        self._events: list[tuple[int, int, int, Action]] = []
        self._issued = 0

    def issue(
        self,
        kind: Kind,
        label: str,
        *,
        lanes: Sequence[str],
        duration_ns: int,
        after: After = (),
        call: int = 0,
        draws: Iterable[tuple[str, int]] = (),
    ) -> Action:
        """Occupy `lanes`, each once, for `duration_ns` (longer where a resource is scarce) when `after` has ended."""
        asked: dict[str, int] = {}
        for name, rate in draws:
            asked[name] = asked.get(name, 0) + rate
        lanes = tuple(dict.fromkeys(lanes))
        action = Action(self._issued, kind, label, lanes, call, tuple(asked.items()), duration_ns * _FULL_SPEED)
        self._issued += 1
        before = {each.number: each for each in after if each.end_ns is None}
        for lane in lanes:
            last = self._last.get(lane)
            if last is not None and last.end_ns is None:
                before[last.number] = last
            self._last[lane] = action
        action.waits_for = len(before)
        for each in before.values():
            each.followers.append(action)
        if not before:
            self._begin(action)
        return action

    def settle(self, until: After) -> int:
        """Let time pass until all of `until` has ended; return that instant. What else is under way goes on later."""
        while any(action.end_ns is None for action in until):
            instant, _, version, action = heapq.heappop(self._events)
            if version == action.version:
                self.clock_ns = instant
                self._end(action)
        return self.clock_ns

    def _begin(self, action: Action) -> None:
        action.start_ns = action.since_ns = self.clock_ns
        self._schedule(action)
        if action.left:
            for name, rate in action.draws:
                self._asked[name] += rate
                self._drawing[name][action.number] = action
            self._share(action)

    def _end(self, action: Action) -> None:
        action.end_ns = self.clock_ns
        action.version += 1
        for name, rate in action.draws:
            if self._drawing[name].pop(action.number, None) is not None:
                self._asked[name] -= rate
        self._share(action)
        for follower in action.followers:
            follower.waits_for -= 1
            if follower.waits_for == 0:
                self._begin(follower)
        action.followers = []

    def _share(self, changed: Action) -> None:
        """Give everything that shares a resource with an action the speed that it now has."""
        affected: dict[int, Action] = {}
        for name, _ in changed.draws:
            asked, capacity = self._asked[name], self._capacities[name]
            speed = _FULL_SPEED if asked <= capacity else capacity * _FULL_SPEED // asked
            if speed != self._speeds[name]:
                self._speeds[name] = speed
                affected.update(self._drawing[name])
        if changed.end_ns is None:
            affected[changed.number] = changed
        for action in affected.values():
            speed = min((self._speeds[name] for name, _ in action.draws), default=_FULL_SPEED)
            if speed != action.speed:
                action.left -= (self.clock_ns - action.since_ns) * action.speed
                action.since_ns, action.speed = self.clock_ns, speed
                action.version += 1
                self._schedule(action)

    def _schedule(self, action: Action) -> None:
        end = action.since_ns + max(0, 2 * action.left + action.speed) // (2 * action.speed)
        heapq.heappush(self._events, (end, action.number, action.version, action))
