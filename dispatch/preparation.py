"""What a model needs to run as a plan says, read and allocated: what stays, the stores of what waits, and slots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from dispatch import page_cache, peers, place
from dispatch.expert_cache import ExpertCache
from dispatch.experts import ExpertPlace, MappedExperts, StreamedExperts
from dispatch.readahead import ReadAhead, room_bytes
from dispatch.slots import SlotRing
from dispatch.stores import HostStore, Store
from dispatch.stream import StreamedGroup
from dispatch.weights import Weights
from planner.errors import InputError
from planner.graph import WeightGroup, full_name
from planner.loading import READERS, resident_ties
from planner.memory import is_mapped, slot_kind, waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.steps import layer_runs

# A group with its tensors' names, or one expert of it.
_Part = tuple[Placement, WeightGroup, list[str], int | None]


class Preparation:
    """The model is left alone: what is here becomes part of it when `attach` does that.

    parts: the model's modules by their paths, where these are no longer what the plan calls them.
    buffers_wait: whether buffers of groups that wait are copied with them, and not kept where these are used.
    resident: tensors by their names; groups: by layer and group; experts: each with its module; mapped: names.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        targets: dict[str, torch.device],
        weights: Weights,
        *,
        parts: Mapping[str, torch.nn.Module] | None = None,
        buffers_wait: bool = False,
    ):
        self.parts = dict(model.named_modules(remove_duplicate=False)) if parts is None else parts
        self.model, self.plan, self.targets, self.weights = model, plan, targets, weights
        self.placed = [
            (p, g, [full_name(p.layer, t.name) for t in g.tensors]) for p, g in with_groups(plan.graph, plan.placements)
        ]
        self.reads_files = any(self._waits_on_disk(p) and waiting_slices(p, g) for p, g, _ in self.placed)
        self.rings: dict[tuple[str, str], SlotRing] = {}
        self.caches: dict[str, ExpertCache] = {}
        self.resident: dict[str, torch.Tensor] = {}
        self.groups: dict[tuple[str, str], StreamedGroup] = {}
        self.experts: list[tuple[torch.nn.Module, MappedExperts | StreamedExperts]] = []
        self.mapped: list[str] = []
        self.ahead: ReadAhead | None = None
        self._tied = {name for names in plan.graph.ties for name in names}
        self._stand_ins: dict[int, torch.Tensor] = {}
        self._buffers_wait = buffers_wait
        self._rankings = plan.graph.rankings()
        self._shared = resident_ties(plan.graph, plan.placements)

    def check(self) -> None:
        """Refuse what cannot be done."""
        waiting = [(p, g, names) for p, g, names in self.placed if self._waits_on_disk(p) and waiting_slices(p, g)]
        if not waiting:
            return
        if self.weights.checkpoint is None:
            raise InputError(
                "the plan lets weights wait on disk: give the checkpoint that holds them, or an offload_dir to write "
                "them to"
            )
        for placement, group, names in waiting:
            if self._is_mapped(placement, group):
                for name in names:
                    self.weights.check_mappable(name)
            for name in names if not self.weights.on_meta and not self.weights.offloaded else []:
                if not self.weights.same_on_disk(name):
                    raise InputError(
                        f"{name} is another in the loaded model than in the checkpoint that it is to wait in; "
                        "give an offload_dir instead of the checkpoint"
                    )

    def load(self) -> None:
        """Load what stays, and make the stores of what waits."""
        self._take_slots()
        with self.weights.reading(READERS, self._reads()):
            parts = sorted(self._parts(), key=lambda part: min(self.weights.file_order(n, part[3]) for n in part[2]))
            with ThreadPoolExecutor(READERS) as pool:
                keys = [(placement.layer, placement.group, expert) for placement, _, _, expert in parts]
                each = map if self._is_all_there() else pool.map
                loaded = dict(zip(keys, each(self._load, parts), strict=True))
            for placement, group, names in self.placed:
                if self._by_expert(placement, group):
                    experts = {e: loaded[placement.layer, placement.group, e] for e in range(group.slices)}
                    self._stream_experts(placement, group, names, experts)
                    continue
                stays, store = loaded[placement.layer, placement.group, None]
                self.resident.update(stays)
                if store is not None:
                    self._stream_group(placement, [name for name in names if name not in stays], store)
            self.resident.update({name: self.resident[first] for name, first in self._shared.items()})
            device = self.targets[self.plan.run_on()[0]]
            for tensor in self.plan.graph.loose:
                self.resident[tensor.name] = self.weights.load(tensor.name, device)
        if self.mapped and page_cache.SUPPORTED:
            self.ahead = ReadAhead(self._in_pages(), room_bytes(self.plan))

    def _is_all_there(self) -> bool:
        """Tell whether nothing is read or copied: threads would cost more than they give."""
        on_host = all(device.type == "cpu" for device in self.targets.values())
        return on_host and self.weights.checkpoint is None and not any(waiting_slices(p, g) for p, g, _ in self.placed)

    def _in_pages(self) -> dict[str, list[torch.Tensor]]:
        """Return {module: its tensors in mapped files}, in the order of a pass; not embeddings: few rows are used.

        A trace tells whether a layer other than embeddings uses the weight of one.
        """
        traced = bool(self.plan.graph.passes)
        mapped, found = set(self.mapped), dict[str, list[torch.Tensor]]()
        named = {(placement.layer, placement.group): names for placement, _, names in self.placed}
        modules = self.parts
        for run in layer_runs(self.plan.graph, self.plan.placements):
            for part in run.parts:
                layer, group = part.placement.layer, part.placement.group
                path = full_name(layer, group) if full_name(layer, group) in modules else layer
                names = [n for n in named[layer, group] if n in mapped and self.weights.in_pages(n)]
                by_rows = part.group.by_rows or (not traced and isinstance(modules[path], torch.nn.Embedding))
                if names and not by_rows:
                    found.setdefault(path, []).extend(self.resident[name] for name in names)
        return found

    def _reads(self) -> Iterator[tuple[str, torch.device, bool]]:
        """Yield (name, device, whether slice by slice) of everything that `prepare` may read."""
        for placement, group, names in self.placed:
            device, waiting = self.targets[placement.run_on], waiting_slices(placement, group)
            for name, tensor in zip(names, group.tensors, strict=True):
                if waiting < group.slices or (tensor.buffer and not self._runs_on_host(placement)):
                    yield name, device, waiting > 0 and group.slices > 1
                if waiting and not self._waits_on_disk(placement):
                    yield name, torch.device("cpu"), group.slices > 1
        for tensor in self.plan.graph.loose:
            yield tensor.name, self.targets[self.plan.run_on()[0]], False

    def adopt(
        self,
        stores: Mapping[tuple[str, str], Store],
        experts: Mapping[tuple[str, str], dict[int, ExpertPlace]],
        mapped: list[str],
        unwritten: list[str],
        written: Collection[str],
    ) -> None:
        """Take what waits as another model's preparation has it, where the model has all that stays.

        mapped: names of what is used straight from mapped files; unwritten: of those that still are as the files.
        written: names of experts that no file holds as they are.
        """
        self._take_slots()
        for placement, group, names in self.placed:
            key = placement.layer, placement.group
            if key in experts:
                places = {e: (stays, self._pinned(placement, store)) for e, (stays, store) in experts[key].items()}
                self._stream_experts(placement, group, names, places, written)
            elif key in stores:
                store = self._pinned(placement, stores[key])
                self._stream_group(placement, [piece.name for piece in store.layout.pieces], store)
        self.resident.update({name: self.weights.map(name) for name in unwritten})
        self.mapped = unwritten
        if unwritten and page_cache.SUPPORTED:
            self.ahead = ReadAhead(self._in_pages(), room_bytes(self.plan))
        self.mapped = mapped

    def _pinned(self, placement: Placement, store: Any) -> Any:
        """Return a store in pinned memory where that is wanted, and it is in other memory, as what was pickled is."""
        device = self.targets[placement.run_on]
        if isinstance(store, HostStore) and placement.memory != "pageable" and device.type == "cuda":
            return store if store.slab.is_pinned() else store.copied(device, pinned=True)
        return store

    def _take_slots(self) -> None:
        peers.check(list(self.targets.values()))
        for entry in self.plan.slots:
            wanted = (self.plan.hardware.disk(entry.device), entry.device, entry.holds)
            staging = any((p.home, p.run_on, slot_kind(group)) == wanted for p, group, _ in self.placed)
            ring = SlotRing(self.targets[entry.device], entry.count, entry.slot_bytes, staging=staging)
            self.rings[entry.device, entry.holds] = ring
            if entry.holds == "experts":
                self.caches[entry.device] = ExpertCache(ring)

    def _parts(self) -> Iterator[_Part]:
        """Yield what is loaded by one reader at a time: groups, and single experts of those of which some wait."""
        for placement, group, names in self.placed:
            experts = range(group.slices) if self._by_expert(placement, group) else (None,)
            yield from ((placement, group, names, expert) for expert in experts)

    def _load(self, part: _Part) -> tuple[dict[str, torch.Tensor], Store | None]:
        """Return the tensors that stay where they are put, and where the others wait."""
        placement, group, names, expert = part
        device = self.targets[placement.run_on]
        if expert is not None:
            ranked = self._rankings.get(placement.layer, tuple(range(group.slices)))
            if expert in ranked[: placement.resident_slices or 0]:
                return self.weights.slab(names, device, expert=expert), None
            mapped = self._is_mapped(placement, group)
            return {}, None if mapped else self._store(placement, names, device, expert)
        if waiting_slices(placement, group) == 0:
            names = sorted((name for name in names if name not in self._shared), key=self.weights.file_order)
            own = [place.get(*place.owner(self.model, name)) for name in names]
            if device.type == "cpu" or any(not tensor.is_meta and tensor.device == device for tensor in own):
                return {name: self.weights.load(name, device) for name in names}, None
            # One slab for a group: many small allocations would leave the allocator's segments half empty.
            return self.weights.slab(names, device), None
        if self._is_mapped(placement, group):
            self.mapped += names
            return {name: self.weights.map(name) for name in names}, None
        buffers = [tensor.buffer and not self._buffers_wait for tensor in group.tensors]
        stays = {name: self.weights.load(name, device) for name, buffer in zip(names, buffers, strict=True) if buffer}
        return stays, self._store(placement, [name for name in names if name not in stays], device)

    def _stream_group(self, placement: Placement, names: list[str], store: Store) -> None:
        owners = {name: place.owner_in(self.parts, name) for name in names}
        path = full_name(placement.layer, placement.group)
        group = StreamedGroup(path, owners, store, layer=placement.layer, stand_ins=self._stand_ins, tied=self._tied)
        self.groups[placement.layer, placement.group] = group

    def _stream_experts(
        self,
        placement: Placement,
        group: WeightGroup,
        names: list[str],
        experts: dict[int, tuple[dict[str, torch.Tensor], Store | None]],
        written: Collection[str] = (),
    ) -> None:
        path = full_name(placement.layer, placement.group)
        module = self.parts[path]
        leaves = {name: name.removeprefix(f"{path}.") for name in names}
        resident = {e: {leaves[n]: view for n, view in stays.items()} for e, (stays, _) in experts.items() if stays}
        owners = {leaf: (module, leaf) for leaf in leaves.values()}
        # What a loaded model keeps in memory may be other than what its checkpoint holds.
        stored = self.weights.checkpoint is not None and (self._waits_on_disk(placement) or self.weights.on_meta)
        files = {
            leaf: partial(self.weights.view, name) for name, leaf in leaves.items() if stored and name not in written
        }
        if self._is_mapped(placement, group):
            whole = {leaves[name]: self.weights.map(name) for name in names}
            mapped = {e: {leaf: tensor[e] for leaf, tensor in whole.items()} for e in experts if e not in resident}
            self.experts.append((module, MappedExperts(owners, resident, mapped, name=path, files=files)))
            return
        waiting = {e: store.renamed(leaves) for e, (_, store) in experts.items() if store is not None}
        cache, limit = self.caches.get(placement.run_on), placement.cpu_up_to_tokens
        source = StreamedExperts(cache, owners, resident, waiting, name=path, files=files, cpu_up_to_tokens=limit)
        self.experts.append((module, source))

    def _store(self, placement: Placement, names: list[str], device: torch.device, expert: int | None = None) -> Store:
        on_disk, pinned = self._waits_on_disk(placement), placement.memory != "pageable"
        return self.weights.store(names, on_disk=on_disk, target=device, expert=expert, pinned=pinned)

    def _waits_on_disk(self, placement: Placement) -> bool:
        return placement.home == self.plan.hardware.disk(placement.run_on)

    @staticmethod
    def _by_expert(placement: Placement, group: WeightGroup) -> bool:
        return group.slices > 1 and waiting_slices(placement, group) > 0

    def _is_mapped(self, placement: Placement, group: WeightGroup) -> bool:
        return is_mapped(self.plan.hardware, group, placement.run_on, placement.memory)

    def _runs_on_host(self, placement: Placement) -> bool:
        return placement.run_on == self.plan.hardware.host(placement.run_on)
