"""A device map as Accelerate writes it ({"model.layers.0": 0, "lm_head": "cpu", "": "disk"}), and what it places where.

A key names a module at any depth, or one tensor, and holds for everything under it that no longer key names. Modules
on "cpu" and "disk" run on the main device, the first GPU of the map; without a GPU in the map that is the CPU.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.errors import InputError
from planner.graph import LayerGraph, WeightGroup, full_name
from planner.hardware import Hardware, listed
from planner.plan import Placement
from planner.units import format_bytes

# What a plan made of a map says of itself.
MAPPED = "placed by a device map, with no solver"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMap:
    """Modules and their places, called as the hardware calls them.

    main: the device that runs what waits in host memory or on disk.
    """

    entries: dict[str, str]
    main: str

    @classmethod
    def read(cls, given: Mapping[str, int | str], hardware: Hardware) -> DeviceMap:
        """Return the map that was given: module → number of a GPU, "cuda:0", "cpu" or "disk".

        Raises:
            InputError: it is empty, or names a device that the hardware does not have.
        """
        if not given:
            raise InputError('the device map is empty; {"": 0} puts all on the first GPU')
        places = {name: _place(name, place, hardware) for name, place in given.items()}
        gpus = [gpu.name for gpu in hardware.gpus if gpu.name in places.values()]
        main = gpus[0] if gpus else hardware.hosts[0].name
        if hardware.disk(main) in places.values() and not hardware.pool(hardware.disk(main)).capacity_bytes:
            name = next(name for name, place in places.items() if place == hardware.disk(main))
            raise InputError(f"the device map puts {_said(name)} on disk, and the machine has none for weights")
        return cls(entries=places, main=main)

    def place_of(self, name: str) -> str | None:
        """Return where a tensor waits: what is said of the longest path above it; None where nothing is."""
        while name not in self.entries and name:
            name = name.rpartition(".")[0]
        return self.entries.get(name)

    def places(self, graph: LayerGraph) -> dict[str, str]:
        """Return where each tensor waits, by its full name; one that only its tied twin's name covers, with that one.

        Buffers that the map leaves out are on the main device.

        Raises:
            InputError: a parameter is not covered.
        """
        tensors = [(name, tensor) for _, _, name, tensor in graph.tensors()]
        tensors += [(tensor.name, tensor) for tensor in graph.loose]
        twins = {name: names for names in graph.ties for name in names}
        found, missing = {}, []
        for name, tensor in tensors:
            there = (self.place_of(twin) for twin in (name, *twins.get(name, ())))
            place = next((place for place in there if place is not None), None)
            if place is None and not tensor.buffer:
                missing.append(name)
            found[name] = place or self.main
        if missing:
            others = f" and of {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise InputError(
                f'the device map says nothing of {missing[0]}{others}; add their modules, or "" for all that is left'
            )
        return found

    def unknown(self, graph: LayerGraph) -> list[str]:
        """Return the names under which the graph has no tensor: modules without any, or names that are wrong."""
        known = {""}
        for name in self._tensor_names(graph):
            while name not in known:
                known.add(name)
                name = name.rpartition(".")[0]
        return [name for name in self.entries if name not in known]

    def check_names(self, graph: LayerGraph, modules: Collection[str] = ()) -> None:
        """Raise InputError where the map names what is neither in the graph nor one of `modules`."""
        wrong = [name for name in self.unknown(graph) if name not in modules]
        if wrong:
            names = [layer.name for layer in graph.layers]
            close = difflib.get_close_matches(wrong[0], [*names, *modules], n=3, cutoff=0.6)
            likely = listed(close or [name for name in names[:3] if name])
            others = f" (and {len(wrong) - 1:,} more that are not there)" if len(wrong) > 1 else ""
            raise InputError(f"the device map names {wrong[0]!r}{others}; the model has no such module; try {likely}")

    @staticmethod
    def _tensor_names(graph: LayerGraph) -> list[str]:
        return [*(name for _, _, name, _ in graph.tensors()), *(tensor.name for tensor in graph.loose)]


def merged(places: Mapping[str, int | str]) -> dict[str, int | str]:
    """Return the shortest map in which no key lies under another, from tensors and their places.

    A module whose tensors are all in one place is one key; {"": place} where everything is.
    """
    below: dict[str, set[int | str]] = {}
    for name, place in places.items():
        while True:
            below.setdefault(name, set()).add(place)
            if not name:
                break
            name = name.rpartition(".")[0]
    found: dict[str, int | str] = {}
    for name, place in places.items():
        parts = name.split(".")
        above = ("", *(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
        found[next(path for path in above if len(below[path]) == 1)] = place
    return found


def placed(graph: LayerGraph, hardware: Hardware, mapped: DeviceMap) -> tuple[tuple[Placement, ...], list[str]]:
    """Return every group where the map puts it, and in words what cannot be placed just so.

    A layer runs on the GPU that the map has for any of it, else on the main device. A group whose tensors are in
    several places waits at the farthest of them; one that must wait where its layer runs, there.

    Raises:
        InputError: the map says nothing of a parameter, or splits one layer between two GPUs.
    """
    places = mapped.places(graph)
    tensors: dict[int, list[str]] = {}
    for index, _, name, _ in graph.tensors():
        tensors.setdefault(index, []).append(name)
    found: list[Placement] = []
    kept_bytes, split = 0, 0
    for index, layer in enumerate(graph.layers):
        names = tensors.get(index, [])
        run_on = _run_on(layer.name, [places[name] for name in names], hardware, mapped)
        for group in graph.kind_of(index).groups:
            own = [places[full_name(layer.name, tensor.name)] for tensor in group.tensors]
            home = _farthest([*own, run_on], hardware, run_on)
            split += len(set(own)) > 1
            if home != run_on and not group.streamable and hardware.device(run_on).kind != "cpu":
                home = run_on
                kept_bytes += group.nbytes
            found.append(_placement(layer.name, group, home, run_on, hardware))
    notes = []
    if kept_bytes:
        notes.append(
            f"{format_bytes(kept_bytes)} that the map lets wait elsewhere (norms, embeddings, head) stay where they "
            "are used: our engine does not stream them"
        )
    if split:
        notes.append(f"{split:,} weight groups that the map splits wait whole, at the farthest of their places")
    return tuple(found), notes


def _place(name: str, given: int | str, hardware: Hardware) -> str:
    """Return the hardware's name of a place in a map."""
    text = str(given).strip()
    gpus = [gpu.name for gpu in hardware.gpus]
    if not isinstance(given, bool):
        if re.fullmatch(r"[0-9]{1,4}", text) and int(text) < len(gpus):
            return gpus[int(text)]
        text = "cuda:0" if text == "cuda" else text
        if text in gpus or text in (pool.name for pool in hardware.pools):
            return text
        # With several nodes a map means the first one's host.
        if text in ("cpu", "disk"):
            return hardware.host(hardware.devices[0].name) if text == "cpu" else hardware.disk(hardware.devices[0].name)
    there = listed([*gpus, hardware.host(hardware.devices[0].name), hardware.disk(hardware.devices[0].name)])
    raise InputError(f"the device map puts {_said(name)} on {given!r}, and there is no such device; there are {there}")


def _said(name: str) -> str:
    return repr(name) if name else '"" (all that is left)'


def _run_on(layer: str, places: Sequence[str], hardware: Hardware, mapped: DeviceMap) -> str:
    there = places or [mapped.place_of(layer) or mapped.main]
    used = [gpu.name for gpu in hardware.gpus if gpu.name in there]
    if len(used) > 1:
        raise InputError(
            f"the device map splits {layer or 'the model'} between {' and '.join(used)}; a layer runs on one device "
            "here: put it on one of them"
        )
    return used[0] if used else mapped.main


def _farthest(places: Sequence[str], hardware: Hardware, run_on: str) -> str:
    """Return of a group's places the one that its copies begin at: the disk, the host, or where it runs."""
    disk, host = hardware.disk(run_on), hardware.host(run_on)
    kinds = {place.rpartition("/")[2] for place in places}
    return disk if "disk" in kinds else host if "cpu" in kinds else run_on


def _placement(layer: str, group: WeightGroup, home: str, run_on: str, hardware: Hardware) -> Placement:
    memory: Literal["device", "pinned", "pageable", "disk"] = "device"
    if home == hardware.disk(run_on):
        memory = "disk"
    elif home == hardware.host(run_on):
        memory = "pageable" if home == run_on else "pinned"
    kept = group.slices if home == run_on else 0
    return Placement(
        layer=layer,
        group=group.name,
        home=home,
        memory=memory,
        run_on=run_on,
        nbytes=group.nbytes,
        resident_slices=kept if group.slices > 1 else None,
    )
