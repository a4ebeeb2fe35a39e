"""The engine: lanes in order, resources that are shared, and a total order of events; against a slow, exact one."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from simulate.engine import Action, Engine


def times(*actions: Action) -> list[tuple[int | None, int | None]]:
    return [(action.start_ns, action.end_ns) for action in actions]


def test_lanes_take_one_action_at_a_time_in_the_order_of_issue() -> None:
    engine = Engine()
    a = engine.issue("run", "a", lanes=("x",), duration_ns=10)
    b = engine.issue("copy", "b", lanes=("y",), duration_ns=4)
    c = engine.issue("copy", "c", lanes=("x", "y"), duration_ns=5, after=(b,))
    d = engine.issue("run", "d", lanes=("y",), duration_ns=0)
    assert engine.settle((c, d)) == 15
    assert times(a, b, c, d) == [(0, 10), (0, 4), (10, 15), (15, 15)]


def test_what_is_issued_later_begins_now_and_not_before() -> None:
    engine = Engine()
    first = engine.issue("run", "first", lanes=("x",), duration_ns=10)
    ahead = engine.issue("copy", "ahead", lanes=("y",), duration_ns=25)
    assert engine.settle((first,)) == 10
    assert ahead.end_ns is None
    second = engine.issue("run", "second", lanes=("x",), duration_ns=5, after=(first,))
    third = engine.issue("run", "third", lanes=("x",), duration_ns=1, after=(ahead,))
    engine.settle((third,))
    assert times(second, ahead, third) == [(10, 15), (0, 25), (25, 26)]


def test_a_scarce_resource_slows_all_alike_and_no_longer_than_it_is_scarce() -> None:
    engine = Engine({"memory": 60})
    # Together they ask for 90 of 60: both at two thirds until the copy has ended.
    cpu = engine.issue("run", "cpu", lanes=("x",), duration_ns=100, draws=[("memory", 60)])
    copy = engine.issue("copy", "copy", lanes=("y",), duration_ns=20, draws=[("memory", 30)])
    engine.settle((cpu, copy))
    assert times(cpu, copy) == [(0, 110), (0, 30)]


def test_what_fits_is_not_slowed() -> None:
    engine = Engine({"memory": 90, "root": 1})
    cpu = engine.issue("run", "cpu", lanes=("x",), duration_ns=100, draws=[("memory", 60)])
    copy = engine.issue("copy", "copy", lanes=("y",), duration_ns=20, draws=[("memory", 30)])
    engine.settle((cpu, copy))
    assert times(cpu, copy) == [(0, 100), (0, 20)]


def test_what_draws_twice_counts_twice() -> None:
    engine = Engine({"memory": 30})
    read = engine.issue("copy", "through", lanes=("y",), duration_ns=10, draws=[("memory", 30), ("memory", 30)])
    assert engine.settle((read,)) == 20


def test_a_lane_that_is_named_twice_is_taken_once() -> None:
    engine = Engine()
    first = engine.issue("run", "first", lanes=("x",), duration_ns=3)
    both = engine.issue("copy", "both", lanes=("x", "x"), duration_ns=4)
    assert engine.settle((first, both)) == 7
    assert both.lanes == ("x",)


class Job:
    """What the slow engine knows of an action."""

    def __init__(self, lanes: tuple[str, ...], duration: int, after: tuple[int, ...], draws: list[tuple[str, int]]):
        self.lanes, self.after, self.draws = lanes, after, draws
        self.left = Fraction(duration)
        self.start: Fraction | None = None
        self.end: Fraction | None = None


def slowly(jobs: list[Job], capacities: dict[str, int]) -> None:
    """Find all instants in exact fractions, asking again at each event what could run."""
    now = Fraction(0)
    while any(job.end is None for job in jobs):
        for number, job in enumerate(jobs):
            earlier = [other for other in jobs[:number] if set(other.lanes) & set(job.lanes)]
            waits = [jobs[i] for i in job.after] + earlier
            if job.start is None and all(other.end is not None for other in waits):
                job.start = now
                if job.left == 0:
                    job.end = now
                    break
        else:
            active = [job for job in jobs if job.start is not None and job.end is None]
            asked = {name: sum(rate for job in active for n, rate in job.draws if n == name) for name in capacities}

            def speed(job: Job, asked: dict[str, int] = asked) -> Fraction:
                return min([Fraction(1), *(Fraction(capacities[n], asked[n]) for n, _ in job.draws)])

            step = min(job.left / speed(job) for job in active)
            now += step
            for job in active:
                job.left -= step * speed(job)
                if job.left == 0:
                    job.end = now


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_end_when_a_slow_engine_says(seed: int) -> None:
    draw = random.Random(seed)
    capacities = {"memory": draw.randrange(20, 120), "root": draw.randrange(20, 120)}
    engine, jobs, actions = Engine(capacities), [], []
    for number in range(draw.randrange(5, 40)):
        lanes = tuple(draw.sample(["a", "b", "c", "d"], draw.choice([1, 1, 1, 2])))
        after = tuple(draw.sample(range(number), min(number, draw.randrange(3))))
        draws = [(name, draw.randrange(10, 80)) for name in capacities if draw.random() < 0.5]
        duration = draw.choice([0, *[draw.randrange(1000, 10**6)] * 5])
        jobs.append(Job(lanes, duration, after, draws))
        actions.append(
            engine.issue(
                "run",
                str(number),
                lanes=lanes,
                duration_ns=duration,
                after=tuple(actions[i] for i in after),
                draws=draws,
            )
        )
    engine.settle(tuple(actions))
    slowly(jobs, capacities)
    for job, action in zip(jobs, actions, strict=True):
        assert job.start is not None
        assert job.end is not None
        # Instants are whole nanoseconds and speeds parts of 2**20.
        assert action.start_ns == pytest.approx(float(job.start), rel=1e-5, abs=len(jobs))
        assert action.end_ns == pytest.approx(float(job.end), rel=1e-5, abs=len(jobs))
