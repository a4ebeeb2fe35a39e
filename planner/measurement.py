"""What a run really took: values that `dispatch.measure` fills, `Plan.check` compares, and a file carries."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.errors import InputError, PlanFormatError
from planner.popularity import Popularity
from planner.serial import canonical, decode, read_text, write_text

MEASUREMENT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """How long the passes of one phase took, in ns, the caller's own work between calls apart."""

    passes: int
    median_ns: int
    mean_ns: int
    least_ns: int
    most_ns: int

    @classmethod
    def of(cls, times_ns: Sequence[int]) -> PhaseTimes | None:
        """Return what is told of these times; None where there are none."""
        if not times_ns:
            return None
        return cls(
            passes=len(times_ns),
            median_ns=int(statistics.median(times_ns)),
            mean_ns=sum(times_ns) // len(times_ns),
            least_ns=min(times_ns),
            most_ns=max(times_ns),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a stretch of the user's own code took.

    counters: per device, the most bytes by counter, named as in a plan's predictions: "operator_outputs" in tensors
        that operators made, "tensors" of everything on a device, "reserved" by the caching allocator, "device_used" as
        the driver tells (of every process). Devices are called as the plan calls them where one plays one.
    prefill, decode: passes over prompts, and of single tokens after them; None where there were none.
    total_ns: of the whole stretch.
    metered: operators were followed one by one, which slows them: times are upper bounds.
    rows, prompt_tokens, context_tokens: the most sequences in one call, tokens of a prompt, and tokens of context.
    routed: by layer, how often each of its experts was routed to, by its number.
    """

    schema_version: int = MEASUREMENT_VERSION
    model: str
    counters: dict[str, dict[str, int]]
    prefill: PhaseTimes | None
    decode: PhaseTimes | None
    total_ns: int
    metered: bool
    rows: int
    prompt_tokens: int
    context_tokens: int
    routed: dict[str, tuple[int, ...]]

    def popularity(self) -> Popularity:
        """Return how popular experts were, to be given to the next plan; layers that nothing came by are left out.

        Raises:
            InputError: no routing was seen.
        """
        found = Popularity.of({layer: counts for layer, counts in self.routed.items() if any(counts)} or None)
        if found is None:
            raise InputError(
                "no routing was seen: the model has no fused experts, measure(routing=False) left them out, or nothing "
                "was called"
            )
        return found

    def to_json(self) -> str:
        """Return canonical JSON, ending in a newline."""
        return canonical(self)

    def save(self, path: str | Path) -> None:
        """Write the measurement, all or nothing.

        Raises:
            InputError: the path cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Read a measurement back.

        Raises:
            PlanFormatError: not JSON, not a measurement, or of a version that is not known.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise PlanFormatError(f"not a measurement: it is not JSON ({exc})") from exc
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != MEASUREMENT_VERSION:
            raise PlanFormatError(
                f"not a measurement of version {MEASUREMENT_VERSION}: schema_version is {version!r}; measure again"
            )
        return decode(cls, data, where="measurement")

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a measurement from a file.

        Raises:
            InputError: the file cannot be read. PlanFormatError: it is not a measurement.
        """
        return cls.from_json(read_text(path, what="measurement"))
