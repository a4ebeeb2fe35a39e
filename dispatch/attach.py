"""Makes a model run as a Plan says: `apply`, and `remove`, which gives back a plain model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dispatch import hooks, own_device, page_cache, peers, place
from dispatch.checkpoint import Checkpoint
from dispatch.conventions import Conventions
from dispatch.expert_cache import CacheStatistics, ExpertCache
from dispatch.experts import MappedExperts, StreamedExperts
from dispatch.learned_order import LearnedStream
from dispatch.limits import Limits, OnExceed
from dispatch.match import check_matches
from dispatch.measure import NAMES_ATTRIBUTE, plan_names
from dispatch.mover import Boundary, Moved, is_trained, mover
from dispatch.offload_folder import OFFLOAD_FILE, Waiting, write
from dispatch.progress import loading_bar
from dispatch.readahead import ReadAhead, room_bytes
from dispatch.session import Dispatch, Session
from dispatch.slots import SlotRing
from dispatch.stores import Store
from dispatch.stream import GroupStream, StreamedGroup
from dispatch.targets import check_carried_out, find_targets
from dispatch.waiting import waiting_on_disk
from dispatch.weights import Weights
from dispatch.whole_state import WholeState
from planner import execution as implementations
from planner.errors import InputError, PlanMismatchError
from planner.graph import WeightGroup, full_name
from planner.loading import READERS, read_bytes, resident_ties
from planner.memory import is_mapped, slot_kind, waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.steps import layer_runs

_ATTRIBUTE = "_loadplan_dispatch"
# On a module whose weights are streamed: (their stream, their group).
GROUP_ATTRIBUTE = "_loadplan_group"
# What would meet weights that are elsewhere, and is refused while they are.
_REFUSED = {
    "_apply": "moving or converting it",
    "load_state_dict": "load_state_dict",
    "state_dict": "state_dict",
    "__deepcopy__": "copying it",
    "__reduce_ex__": "pickling it",
}
_COPYING = ("__deepcopy__", "__reduce_ex__")


def apply(
    model: Any,
    plan: Plan,
    checkpoint: str | Path | None = None,
    *,
    devices: Mapping[str, torch.device | str] | None = None,
    offload_dir: str | Path | None = None,
    on_exceed: OnExceed | None = None,
    progress: bool | None = None,
) -> torch.nn.Module:
    """Put every weight of `model` where the plan says, and make it run so; return the model.

    model: on meta (filled from `checkpoint`), already loaded, or a name, folder or config to build it from.
    devices: real devices for the plan's names, {"cuda:0": "cuda:3"}; each is itself unless named.
    offload_dir: where a loaded model's weights go that are to wait on disk, if no checkpoint holds them.
    on_exceed: what is done about a call with more rows, tokens or context than planned: "warn" tells what it would take
        at least, and refuses what cannot fit by the plan's figures; "refuse" refuses it; "replan" plans for it and
        dispatches anew before a prompt is taken. None is "warn", but leaves a model that is wholly resident on one
        device without any hook, and so without a word.
    progress: whether a bar on stderr shows how far loading is; None shows it on a terminal.

    Everything that can be refused is refused before the model is changed.

    Raises:
        InputError: a device or file is missing or damaged. PlanMismatchError: the plan is for another model.
    """
    check_carried_out(plan)
    module, checkpoint = _as_module(model, plan, checkpoint)
    check_plain(module)
    check_matches(module, plan)
    targets = find_targets(plan, devices or {})
    opened = Checkpoint.open(checkpoint) if checkpoint is not None else None
    offloaded = opened is None and not any(p.is_meta for p in module.parameters())
    waiting = _offload(module, plan, offload_dir) if offloaded else None
    if waiting is not None:
        opened = waiting.checkpoint
    weights = Weights(module, opened, offloaded=offloaded, sources=None if waiting is None else waiting.sources)
    limits = Limits(plan, targets, on_exceed or "warn")

    def by_another(larger: Plan) -> Session:
        if weights.on_meta:
            _let_go(module)
        else:
            remove(module)
            if weights.offloaded and weights.checkpoint is not None and offload_dir is not None:
                # All of it is in memory again, and the new plan's disk homes take its place.
                (Path(offload_dir) / OFFLOAD_FILE).unlink(missing_ok=True)
        apply(module, larger, checkpoint, devices=devices, offload_dir=offload_dir, on_exceed=on_exceed)
        following: Session = getattr(module, _ATTRIBUTE).session
        return following

    state = Dispatched(module, plan, targets, weights, Conventions.of(plan, targets))
    nbytes = read_bytes(plan) if weights.on_meta else 0
    state.start(limits, by_another, served=on_exceed is not None, nbytes=nbytes, progress=progress)
    return module


def check_plain(model: torch.nn.Module) -> None:
    """Raise InputError where a model is dispatched already."""
    if is_dispatched(model):
        raise InputError("this model is dispatched already; call dispatch.remove(model) first")


def remove(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `apply`: no hooks, every weight in memory and tied as it was; return the model.

    A model that ran on one device stays there; one that was spread over several comes to the CPU.

    Raises:
        InputError: the model is not dispatched, or a file that its weights wait in is gone.
    """
    state: Dispatched | None = getattr(model, _ATTRIBUTE, None)
    if state is None:
        raise InputError("this model is not dispatched")
    state.detach()
    delattr(model, _ATTRIBUTE)
    delattr(model, NAMES_ATTRIBUTE)
    return model


def state_of(model: torch.nn.Module) -> Dispatched:
    """Return what was done to a model, or to the one inside it.

    Raises:
        InputError: nothing was.
    """
    for each in model.modules():
        if _ATTRIBUTE in vars(each):
            state: Dispatched = vars(each)[_ATTRIBUTE]
            return state
    raise InputError("this model is not dispatched")


def is_dispatched(model: torch.nn.Module) -> bool:
    return getattr(model, _ATTRIBUTE, None) is not None


def forget(model: torch.nn.Module) -> None:
    """Let a model that has no hooks go on as a plain one."""
    state: Dispatched = getattr(model, _ATTRIBUTE)
    if not state.waits:
        delattr(model, _ATTRIBUTE)
        delattr(model, NAMES_ATTRIBUTE)


def _let_go(model: torch.nn.Module) -> None:
    """Undo `apply`, and leave the model on meta: nothing is read."""
    getattr(model, _ATTRIBUTE).detach(read=False)
    delattr(model, _ATTRIBUTE)
    delattr(model, NAMES_ATTRIBUTE)


def cache_statistics(model: torch.nn.Module) -> tuple[CacheStatistics, ...]:
    """Return what the slots for experts did since `apply`, device by device; none where no experts are copied.

    Raises:
        InputError: the model is not dispatched.
    """
    state: Dispatched | None = getattr(model, _ATTRIBUTE, None)
    if state is None:
        raise InputError("this model is not dispatched")
    return tuple(
        CacheStatistics(
            device=device, slots=len(cache.ring), hits=cache.hits, copies=cache.copies, copied_bytes=cache.copied_bytes
        )
        for device, cache in state.caches.items()
    )


class Dispatched:
    """What was done to one model. `prepare` reads and allocates and leaves the model alone; `attach` changes it."""

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        targets: dict[str, torch.device],
        weights: Weights,
        conventions: Conventions,
    ):
        self.model, self.plan, self.targets, self.weights = model, plan, targets, weights
        self.conventions = conventions
        self.placed = [
            (p, g, [full_name(p.layer, t.name) for t in g.tensors]) for p, g in with_groups(plan.graph, plan.placements)
        ]
        self.rankings = plan.graph.rankings()
        self.reads_files = any(self._waits_on_disk(p) and waiting_slices(p, g) for p, g, _ in self.placed)
        self.rings: dict[tuple[str, str], SlotRing] = {}
        self.caches: dict[str, ExpertCache] = {}
        self.resident: dict[str, torch.Tensor] = {}
        self.groups: dict[tuple[str, str], StreamedGroup] = {}
        self.experts: list[tuple[torch.nn.Module, MappedExperts | StreamedExperts]] = []
        self.mapped: list[str] = []
        self.ahead: ReadAhead | None = None
        self.shared = resident_ties(plan.graph, plan.placements)
        self.hooked: list[torch.nn.Module] = []
        self.tied: dict[tuple[str, torch.device], torch.nn.Parameter] = {}
        self.moved: Moved = {}
        self.before: dict[str, Any] = {}
        self.streams: list[GroupStream] = []
        self.told: list[tuple[torch.nn.Module, type]] = []
        self.session: Session | None = None
        self.alone = threading.RLock()
        # Where each tensor is, and the modules that are there; adapters may come between later.
        self.owners = {name: place.owner(model, name) for name, _ in place.named_tensors(model)}
        self.known = weakref.WeakSet(model.modules())
        self.waits = False

    def start(
        self,
        limits: Limits | None = None,
        by_another: Dispatch | None = None,
        *,
        served: bool = False,
        nbytes: int = 0,
        progress: bool | None = None,
    ) -> None:
        """Load, and make the model run so. All that can be refused is refused before the model is changed.

        by_another: dispatches by a larger plan, where the limits ask for it.
        served: calls are held to the limits even where nothing waits. nbytes: that are read, for the bar.
        """
        self.check()
        with loading_bar(nbytes, shown=progress) as self.weights.loaded:
            self.prepare()
        self.attach()
        if self.waits or served:
            session = Session(
                limits, begin=self.begin_call, end=self.end_call, recover=self.recover, dispatch=by_another,
                lock=self.alone,
            )  # fmt: skip
            self.serve(session)
        if self.conventions.returns:
            hooks.attach_around(self.model, Boundary(self.conventions.skip_keys))
            self.hooked.append(self.model)
        setattr(self.model, _ATTRIBUTE, self)
        setattr(self.model, NAMES_ATTRIBUTE, plan_names(self.plan, self.targets))

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

    def prepare(self) -> None:
        """Load what stays, and make the stores of what waits."""
        peers.check(list(self.targets.values()))
        for entry in self.plan.slots:
            wanted = (self.plan.hardware.disk(entry.device), entry.device, entry.holds)
            staging = any((p.home, p.run_on, slot_kind(group)) == wanted for p, group, _ in self.placed)
            ring = SlotRing(self.targets[entry.device], entry.count, entry.slot_bytes, staging=staging)
            self.rings[entry.device, entry.holds] = ring
            if entry.holds == "experts":
                self.caches[entry.device] = ExpertCache(ring)
        with self.weights.reading(READERS, self._reads()):
            with ThreadPoolExecutor(READERS) as pool:
                stored = sorted(self.placed, key=lambda entry: min(map(self.weights.file_order, entry[2])))
                for loaded in pool.map(self._load_resident, stored):
                    self.resident.update(loaded)
            self.resident.update({name: self.resident[first] for name, first in self.shared.items()})
            for placement, group, names in self.placed:
                if waiting_slices(placement, group) == 0 or (group.slices == 1 and self._is_mapped(placement, group)):
                    continue
                device = self.targets[placement.run_on]
                if group.slices > 1:
                    self._stream_experts(placement, group, names, device)
                else:
                    self.groups[placement.layer, placement.group] = self._stream_group(placement, names, device)
            device = self.targets[self.plan.run_on()[0]]
            for tensor in self.plan.graph.loose:
                self.resident[tensor.name] = self.weights.load(tensor.name, device)
        if self.mapped and page_cache.SUPPORTED:
            self.ahead = ReadAhead(self._in_pages(), room_bytes(self.plan))

    def _in_pages(self) -> dict[str, list[torch.Tensor]]:
        """Return {module: its tensors in mapped files}, in the order of a pass; not embeddings: few rows are used."""
        mapped, found = set(self.mapped), dict[str, list[torch.Tensor]]()
        named = {(placement.layer, placement.group): names for placement, _, names in self.placed}
        modules = dict(self.model.named_modules())
        for run in layer_runs(self.plan.graph, self.plan.placements):
            for part in run.parts:
                layer, group = part.placement.layer, part.placement.group
                path = full_name(layer, group) if full_name(layer, group) in modules else layer
                names = [n for n in named[layer, group] if n in mapped and self.weights.in_pages(n)]
                if names and not isinstance(modules[path], torch.nn.Embedding):
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

    def attach(self) -> None:
        """Make the model what was prepared."""
        self._set_implementations()
        for name, tensor in self.resident.items():
            self._put(name, tensor)
        self.resident.clear()
        for module, source in self.experts:
            source.leave()
            setattr(module, implementations.SOURCE_ATTRIBUTE, source)
        # The order of copies is that of the plan's steps, not that in which groups were listed.
        streamed: dict[str, list[StreamedGroup]] = {}
        for run in layer_runs(self.plan.graph, self.plan.placements):
            for part in run.parts:
                item = self.groups.get((part.placement.layer, part.placement.group))
                if item is not None:
                    item.leave()
                    streamed.setdefault(run.device, []).append(item)
        self._hook(streamed)
        layers = [layer.name for layer in self.plan.graph.layers]
        devices = {layer: self.targets[name] for layer, name in zip(layers, self.plan.run_on(), strict=True)}
        self.told = own_device.tell(self.model, layers, devices)

    def _load_resident(self, entry: tuple[Placement, WeightGroup, list[str]]) -> dict[str, torch.Tensor]:
        """Return the tensors of a group that stay where they are put; none for a group that is streamed."""
        placement, group, names = entry
        device = self.targets[placement.run_on]
        if waiting_slices(placement, group) == 0:
            names = sorted((name for name in names if name not in self.shared), key=self.weights.file_order)
            own = [place.get(*place.owner(self.model, name)) for name in names]
            if device.type == "cpu" or any(not tensor.is_meta and tensor.device == device for tensor in own):
                return {name: self.weights.load(name, device) for name in names}
            # One slab for a group: many small allocations would leave the allocator's segments half empty.
            return self.weights.slab(names, device)
        if group.slices == 1 and self._is_mapped(placement, group):
            self.mapped += names
            return {name: self.weights.map(name) for name in names}
        return {}

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        device = tensor.device
        module, leaf = place.owner(self.model, name)
        if leaf in module._buffers:
            place.put(module, leaf, tensor)
            return
        current = module._parameters[leaf]
        first = self.plan.graph.tied_to_earlier().get(name, name)
        shared = self.tied.get((first, device))
        if shared is None:
            # A parameter that is in place already stays the very same object.
            in_place = current is not None and not current.is_meta and current.device == tensor.device
            in_place = in_place and current is not None and current.data_ptr() == tensor.data_ptr()
            trained = current is not None and current.requires_grad and self.conventions.keeps_training
            shared = current if in_place and current is not None else place.as_parameter(tensor, requires_grad=trained)
            self.tied[first, device] = shared
        module._parameters[leaf] = shared

    def _stream_group(self, placement: Placement, names: list[str], device: torch.device) -> StreamedGroup:
        owners = {name: place.owner(self.model, name) for name in names}
        waits = self.conventions.buffers_wait
        buffers = [name for name, (module, leaf) in owners.items() if leaf in module._buffers and not waits]
        for name in buffers:
            self.resident[name] = self.weights.load(name, device)
            del owners[name]
        store = self._store(placement, list(owners), device)
        return StreamedGroup(full_name(placement.layer, placement.group), owners, store, layer=placement.layer)

    def _stream_experts(self, placement: Placement, group: WeightGroup, names: list[str], device: torch.device) -> None:
        path = f"{placement.layer}.{placement.group}"
        module = self.model.get_submodule(path)
        kept = placement.resident_slices or 0
        leaves = {name: name.removeprefix(f"{path}.") for name in names}
        ranked = self.rankings.get(placement.layer, tuple(range(group.slices)))
        resident = {
            expert: {leaves[name]: view for name, view in self.weights.slab(names, device, expert=expert).items()}
            for expert in sorted(ranked[:kept])
        }
        owners = {leaf: (module, leaf) for leaf in leaves.values()}
        if self._is_mapped(placement, group):
            whole = {leaves[name]: self.weights.map(name) for name in names}
            mapped = {expert: {leaf: tensor[expert] for leaf, tensor in whole.items()} for expert in ranked[kept:]}
            self.experts.append((module, MappedExperts(owners, resident, mapped, name=path)))
            return
        waiting = {
            expert: self._store(placement, names, device, expert).renamed(leaves) for expert in sorted(ranked[kept:])
        }
        cache, limit = self.caches.get(placement.run_on), placement.cpu_up_to_tokens
        source = StreamedExperts(cache, owners, resident, waiting, cpu_up_to_tokens=limit)
        self.experts.append((module, source))

    def _store(self, placement: Placement, names: list[str], device: torch.device, expert: int | None = None) -> Store:
        on_disk, pinned = self._waits_on_disk(placement), placement.memory != "pageable"
        return self.weights.store(names, on_disk=on_disk, target=device, expert=expert, pinned=pinned)

    def _waits_on_disk(self, placement: Placement) -> bool:
        return placement.home == self.plan.hardware.disk(placement.run_on)

    def _is_mapped(self, placement: Placement, group: WeightGroup) -> bool:
        return is_mapped(self.plan.hardware, group, placement.run_on, placement.memory)

    def _runs_on_host(self, placement: Placement) -> bool:
        return placement.run_on == self.plan.hardware.host(placement.run_on)

    def _hook(self, streamed: dict[str, list[StreamedGroup]]) -> None:
        arguments = self.conventions.arguments
        for path, target in arguments.items():
            self._attach(path, before=mover(target, self.moved, self.conventions.skip_keys))
        # Without a trace nobody knows in which order modules are called.
        kind = GroupStream if self.plan.graph.passes else LearnedStream
        for device, groups in streamed.items():
            stream = kind(self.rings[device, "groups"], groups)
            self.streams.append(stream)
            for group in groups:
                module = self.model.get_submodule(group.name)
                setattr(module, GROUP_ATTRIBUTE, (stream, group))
                self._attach(group.name, before=_acquirer(stream, group, module), after=_releaser(stream, group))
            stream.prefetch()
        self.waits = bool(arguments or self.groups or self.experts or self.mapped)
        for name, what in _REFUSED.items() if self.waits else ():
            setattr(self.model, name, _refusal(what))
        if self.waits and not self.experts:
            self.whole.attach()
        for module in self.hooked:
            # A copy of a part would call what it was copied from.
            vars(module).update({name: _refusal(_REFUSED[name]) for name in _COPYING})
        if self.ahead is not None:
            for path in self.ahead.groups:
                self._attach(path, before=_reacher(self.ahead, path), after=partial(self.ahead.leave, path))

    @property
    def whole(self) -> WholeState:
        """The model's state, wherever it waits."""
        return WholeState(self.model, self.streams, self.plan.graph.ties, self.mapped, self.alone)

    def serve(self, session: Session) -> None:
        """Let calls of the model pass through a session."""
        self.session = session
        session.serve(self.model)
        self.hooked.append(self.model)

    def _attach(self, path: str, *, before: hooks.Before, after: hooks.After | None = None) -> None:
        module = self.model.get_submodule(path)
        hooks.attach(module, before=before, after=after)
        self.hooked.append(module)

    def begin_call(self) -> None:
        """Refuse a call where files that are read in it are not what they were."""
        if self.reads_files and self.weights.checkpoint is not None:
            self.weights.checkpoint.check_unchanged()
        if self.ahead is not None:
            self.ahead.begin()

    def recover(self) -> None:
        """Mend what a call that was interrupted between two hooks left behind."""
        self.moved.clear()
        for stream in self.streams:
            stream.recover()
        if self.ahead is not None:
            self.ahead.end()

    def end_call(self) -> None:
        """Let go of what was held for one call."""
        self.moved.clear()
        if self.ahead is not None:
            self.ahead.end()

    def _set_implementations(self) -> None:
        model: Any = self.model
        execution = self.plan.execution
        if execution.attention is not None and model.config._attn_implementation != execution.attention:
            self.before["attention"] = model.config._attn_implementation
            model.set_attn_implementation(execution.attention)
        if execution.experts is not None:
            implementations.register()
            self.before["experts"] = model.get_experts_implementation()
            model.set_experts_implementation(execution.experts)

    def detach(self, *, read: bool = True) -> None:
        """Read everything that waits, and only then change the model: a file that is gone leaves it as it is.

        read: else nothing is, and every weight is on meta afterwards.
        """
        if read and self.reads_files and self.weights.checkpoint is not None:
            self.weights.checkpoint.check_unchanged()
        for ring in self.rings.values():
            ring.close()
        groups = [(group, group.load()) for group in self.groups.values() if read]
        experts = [(module, source, source.load() if read else None) for module, source in self.experts]
        mapped = {name: place.get(*self.owners[name]).clone() for name in self.mapped if read}
        own_device.untell(self.told)
        for module in self.hooked:
            hooks.detach(module)
            for name in (GROUP_ATTRIBUTE, *_COPYING):
                vars(module).pop(name, None)
        for name in _REFUSED:
            vars(self.model).pop(name, None)
        for group, parameters in groups:
            group.restore(parameters)
        for module, source, whole in experts:
            if whole is not None:
                source.restore(whole)
            delattr(module, implementations.SOURCE_ATTRIBUTE)
        for name, tensor in mapped.items():
            place.put(*self.owners[name], tensor)
        found = {tensor.device for _, tensor in place.named_tensors(self.model)}
        for name, tensor in list(place.named_tensors(self.model)) if len(found) > 1 or not read else []:
            place.put(*place.owner(self.model, name), tensor.detach().to("cpu" if read else "meta"))
        self._tie()
        model: Any = self.model
        if "attention" in self.before:
            model.set_attn_implementation(self.before["attention"])
        if "experts" in self.before:
            model.set_experts_implementation(self.before["experts"])

    def _tie(self) -> None:
        for names in self.plan.graph.ties:
            first, *others = names
            module, leaf = self.owners[first]
            for other in others:
                target, other_leaf = self.owners[other]
                if leaf in module._parameters:
                    target._parameters[other_leaf] = module._parameters[leaf]
                else:
                    target._buffers[other_leaf] = module._buffers[leaf]


def _refusal(what: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"{what} is not carried yet for a model whose weights are streamed: call dispatch.remove first"
        )

    return refuse


def _acquirer(stream: GroupStream, group: StreamedGroup, module: torch.nn.Module) -> hooks.Before:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stream.acquire(group, kept=torch.is_grad_enabled() and is_trained((args, kwargs), module))
        return args, kwargs

    return before


def _reacher(ahead: ReadAhead, name: str) -> hooks.Before:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ahead.reach(name)
        return args, kwargs

    return before


def _releaser(stream: GroupStream, group: StreamedGroup) -> hooks.After:
    return lambda: stream.release(group)


def _as_module(model: Any, plan: Plan, checkpoint: str | Path | None) -> tuple[torch.nn.Module, str | Path | None]:
    """Return the model to dispatch, built on meta from a name, folder or config, and where its weights are."""
    if isinstance(model, torch.nn.Module):
        return model, checkpoint
    # The planner knows how a name becomes a model; it is only needed where a name was given.
    from planner.given import build_on_meta, describe

    source = describe(model)
    if plan.model.config_digest and source.config_digest != plan.model.config_digest and source.source != "config":
        raise PlanMismatchError(f"the plan is for {plan.model.id}, and {source.id} has another config; plan again")
    built = build_on_meta(source, plan.model.weight_dtype).eval()
    if checkpoint is None:
        checkpoint = source.folder
    if checkpoint is not None and (Path(checkpoint) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return built, checkpoint


def _offload(model: torch.nn.Module, plan: Plan, folder: str | Path | None) -> Waiting | None:
    """Write the disk homes of a loaded model to `folder`, when one is given."""
    names = waiting_on_disk(plan)
    return write(model, names, folder) if folder is not None and names else None
