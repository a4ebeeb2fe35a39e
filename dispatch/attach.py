"""Makes a model run as a Plan says: `apply`, and `remove`, which gives back a plain model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dispatch import hooks, others, own_device, place, resizing
from dispatch.built import as_module
from dispatch.checkpoint import Checkpoint
from dispatch.conventions import Conventions
from dispatch.copying import Blueprint, Copies
from dispatch.expert_cache import CacheStatistics
from dispatch.learned_order import LearnedStream
from dispatch.limits import Limits, OnExceed
from dispatch.match import check_matches
from dispatch.measure import NAMES_ATTRIBUTE, plan_names
from dispatch.mover import Boundary, Moved, handed_over, is_away, mover
from dispatch.offload_folder import OFFLOAD_FILE, Waiting, write
from dispatch.preparation import Preparation
from dispatch.progress import loading_bar
from dispatch.readahead import ReadAhead
from dispatch.refusals import allow, refuse
from dispatch.replan import Given
from dispatch.saved_weights import take_off
from dispatch.session import Dispatch, Session
from dispatch.stream import GroupStream, StreamedGroup
from dispatch.targets import check_carried_out, find_targets
from dispatch.waiting import waiting_on_disk
from dispatch.weights import Weights
from dispatch.whole_state import WholeState
from planner import execution as implementations
from planner.errors import InputError
from planner.loading import read_bytes
from planner.plan import Plan
from planner.steps import layer_runs

_ATTRIBUTE = "_loadplan_dispatch"
# On a module whose weights are streamed: (their stream, their group).
GROUP_ATTRIBUTE = "_loadplan_group"
# On a model that runs by a device map: the map.
MAP_ATTRIBUTE = "hf_device_map"
# On a whole model that waits in host memory until it is called: what brings it.
WHOLE_ATTRIBUTE = "_loadplan_whole"


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
    module, checkpoint = as_module(model, plan, checkpoint)
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
    given = Given(checkpoint=checkpoint, devices=devices, offload_dir=offload_dir, on_exceed=on_exceed)
    state = Dispatched(module, plan, targets, weights, Conventions(), given=given)
    nbytes = read_bytes(plan) if weights.on_meta else 0
    state.start(limits, served=on_exceed is not None, nbytes=nbytes, progress=progress)
    return module


def _by_another(state: Dispatched, given: Given) -> Dispatch:
    """Return what dispatches a model anew, as `apply` was told to, by a larger plan."""

    def dispatch(larger: Plan) -> Session:
        module, weights, told = state.model, state.weights, given
        if weights.on_meta and not weights.changed:
            _let_go(module)
        else:
            remove(module)
            # All of it is in memory again, and the new plan's disk homes take its place.
            if weights.lent:
                told = told.another_folder()
            elif weights.offloaded and weights.checkpoint is not None and told.offload_dir is not None:
                (Path(told.offload_dir) / OFFLOAD_FILE).unlink(missing_ok=True)
        apply(
            module, larger, told.checkpoint, devices=told.devices, offload_dir=told.offload_dir,
            on_exceed=told.on_exceed,
        )  # fmt: skip
        following: Session = getattr(module, _ATTRIBUTE).session
        return following

    return dispatch


def revived(read: tuple[Blueprint]) -> torch.nn.Module:
    """Make a copy of a dispatched model run as that one does, with hooks and slots of its own; return it."""
    made = read[0]
    state = Dispatched(
        made.model, made.plan, made.here.targets, made.weights, made.conventions, given=made.given, parts=made.parts,
        names=made.names,
    )  # fmt: skip
    state.has.adopt(made.stores, made.experts, made.mapped, made.unwritten, made.written)
    limits = None if made.on_exceed is None else Limits(made.plan, state.targets, made.on_exceed)
    state.run(limits, served=made.served)
    state.before = made.before
    if made.device_map is not None:
        setattr(made.model, MAP_ATTRIBUTE, dict(made.device_map))
    return made.model


def check_plain(model: torch.nn.Module) -> None:
    """Raise InputError where a model, a part of it, or what it is a part of is dispatched already."""
    place.check_module(model)
    if is_dispatched(model):
        raise InputError("this model is dispatched already; call dispatch.remove(model) first")
    for path, module in model.named_modules():
        if is_dispatched(module) or GROUP_ATTRIBUTE in vars(module):
            raise InputError(
                f"{path or 'this model'} is dispatched already, by itself or as a part: call "
                "remove_hook_from_submodules with the model that was dispatched first"
            )
        if WHOLE_ATTRIBUTE in vars(module):
            raise InputError(f"{path or 'this model'} has a hook of cpu_offload_with_hook; call its remove() first")
        others.check(path, module)


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
    if not state.plan.graph.passes:
        vars(model).pop(MAP_ATTRIBUTE, None)
    return model


def state_of(model: torch.nn.Module) -> Dispatched:
    """Return what was done to a model, or to the one inside it.

    Raises:
        InputError: nothing was.
    """
    place.check_module(model)
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
        state.copies.detach()
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
        for device, cache in state.has.caches.items()
    )


class Dispatched:
    """What was done to one model, with what it `has`."""

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        targets: dict[str, torch.device],
        weights: Weights,
        conventions: Conventions,
        *,
        given: Given | None = None,
        parts: dict[str, torch.nn.Module] | None = None,
        names: Iterable[str] | None = None,
    ):
        """Take parts and names as they were where a model is a copy: adapters may have come between since."""
        self.model, self.plan, self.targets, self.weights = model, plan, targets, weights
        self.conventions, self.given = conventions, given
        self.parts = dict(model.named_modules(remove_duplicate=False)) if parts is None else parts
        self.has = Preparation(model, plan, targets, weights, parts=self.parts, buffers_wait=conventions.buffers_wait)
        self.hooked: list[torch.nn.Module] = []
        self.tied: dict[tuple[str, torch.device], torch.nn.Parameter] = {}
        self.moved: Moved = {}
        self.moving: set[int] = set()
        self.before: dict[str, Any] = {}
        self.streams: list[GroupStream] = []
        self.told: list[tuple[torch.nn.Module, type]] = []
        self.session: Session | None = None
        self.alone = threading.RLock()
        # Where each tensor is, and the modules that are there; adapters may come between later.
        names = [name for name, _ in place.named_tensors(model)] if names is None else names
        self.owners = {name: place.owner_in(self.parts, name) for name in names}
        self.known = weakref.WeakSet(self.parts.values())
        self.copies = Copies(self, revived)
        self.waits = False

    def start(
        self,
        limits: Limits | None = None,
        *,
        served: bool = False,
        nbytes: int = 0,
        progress: bool | None = None,
    ) -> None:
        """Load, and make the model run so. All that can be refused is refused before the model is changed.

        served: calls are held to the limits even where nothing waits. nbytes: that are read, for the bar.
        """
        self.has.check()
        with loading_bar(nbytes, shown=progress) as self.weights.loaded:
            self.has.load()
        self.run(limits, served=served)

    def run(self, limits: Limits | None, *, served: bool) -> None:
        """Make the model run with what was loaded."""
        self.attach()
        if self.waits or served:
            another = None if self.given is None else _by_another(self, self.given)
            session = Session(
                limits, begin=self.begin_call, end=self.end_call, recover=torch.compiler.disable(self.recover),
                dispatch=another, lock=self.alone,
            )  # fmt: skip
            self.serve(session)
        if self.conventions.returns:
            hooks.attach_around(self.model, Boundary(self.conventions.skip_keys))
            self.hooked.append(self.model)
        setattr(self.model, _ATTRIBUTE, self)
        setattr(self.model, NAMES_ATTRIBUTE, plan_names(self.plan, self.targets))
        self.copies.attach(parts=bool(self.hooked))

    def attach(self) -> None:
        """Make the model what was prepared."""
        self._set_implementations()
        firsts = self.plan.graph.tied_to_earlier()
        for name, tensor in self.has.resident.items():
            self._put(name, firsts.get(name, name), tensor)
        self.has.resident.clear()
        for module, source in self.has.experts:
            source.leave()
            setattr(module, implementations.SOURCE_ATTRIBUTE, source)
        # The order of copies is that of the plan's steps, not that in which groups were listed.
        streamed: dict[str, list[StreamedGroup]] = {}
        for run in layer_runs(self.plan.graph, self.plan.placements):
            for part in run.parts:
                item = self.has.groups.get((part.placement.layer, part.placement.group))
                if item is not None:
                    item.leave()
                    streamed.setdefault(run.device, []).append(item)
        self._hook(streamed)
        layers = [layer.name for layer in self.plan.graph.layers]
        devices = {layer: self.targets[name] for layer, name in zip(layers, self.plan.run_on(), strict=True)}
        self.told = own_device.tell(self.model, layers, devices)

    def _put(self, name: str, first: str, tensor: torch.Tensor) -> None:
        """Put a tensor that stays in its place; `first` is the first name of those that it is tied to."""
        device = tensor.device
        module, leaf = self.owners[name]
        if leaf in module._buffers:
            place.put(module, leaf, tensor)
            return
        current = module._parameters[leaf]
        shared = self.tied.get((first, device))
        if shared is None:
            # A parameter that is in place already stays the very same object.
            in_place = current is not None and not current.is_meta and current.device == tensor.device
            in_place = in_place and current is not None and current.data_ptr() == tensor.data_ptr()
            trained = current is not None and current.requires_grad and self.conventions.keeps_training
            shared = current if in_place and current is not None else place.as_parameter(tensor, requires_grad=trained)
            self.tied[first, device] = shared
        module._parameters[leaf] = shared

    def _hook(self, streamed: dict[str, list[StreamedGroup]]) -> None:
        arguments = self.conventions.arguments
        for path, target in arguments.items():
            self._attach(path, before=mover(target, self.moved, self.conventions.skip_keys))
        traced = bool(self.plan.graph.passes)
        several = traced and len({self.targets[name] for name in self.plan.run_on()}) > 1
        if several:
            self._move(self._handed_over())
        # Without a trace nobody knows in which order modules are called.
        kind = GroupStream if traced else LearnedStream
        for device, groups in streamed.items():
            stream = kind(self.has.rings[device, "groups"], groups)
            self.streams.append(stream)
            for group in groups:
                module = self.parts[group.name]
                setattr(module, GROUP_ATTRIBUTE, (stream, group))
                self._attach(
                    group.name,
                    before=_acquirer(stream, group, self.alone),
                    made=partial(stream.apart, group),
                    after=_releaser(stream, group, self.alone),
                )
            stream.prefetch()
        self.waits = bool(arguments or several or self.has.groups or self.has.experts or self.has.mapped)
        if self.has.ahead is not None:
            for path in self.has.ahead.groups:
                self._attach(path, before=_reacher(self.has.ahead, path), after=partial(self.has.ahead.leave, path))
        if self.waits:
            refuse(self.model)
            resizing.explain(self.model)
            self.whole.attach()

    @property
    def whole(self) -> WholeState:
        """The model's state, wherever it waits."""
        ties = [{name: self.owners[name][0] for name in names} for names in self.plan.graph.ties]
        return WholeState(
            self.model, self.streams, self.has.experts, ties=ties, mapped=self.has.mapped, alone=self.alone,
            weights=self.weights,
        )  # fmt: skip

    def _handed_over(self) -> tuple[int, ...]:
        """Return the layers whose inputs may be elsewhere, as long as the caller's own tensors are with the first."""
        layers, config = self.plan.graph.layers, getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            return tuple(range(len(layers)))  # generate calls the encoder by itself
        devices = [self.targets[name] for name in self.plan.run_on()]
        return handed_over(self.plan.graph, devices, [self.parts[e.name].forward for e in layers])

    def _move(self, indices: Iterable[int]) -> None:
        """Let so many more layers have their inputs brought to them."""
        run_on = self.plan.run_on()
        for index in sorted(set(indices) - self.moving):
            self.moving.add(index)
            self._attach(self.plan.graph.layers[index].name, before=mover(self.targets[run_on[index]], self.moved))

    def serve(self, session: Session) -> None:
        """Let calls of the model pass through a session."""
        self.session = session
        session.serve(self.model)
        self.hooked.append(self.model)

    def _attach(
        self, path: str, *, before: hooks.Before, made: hooks.Made | None = None, after: hooks.After | None = None
    ) -> None:
        module = self.parts[path]
        hooks.attach(module, before=before, made=made, after=after)
        self.hooked.append(module)

    def begin_call(self, values: Iterable[Any]) -> None:
        """Refuse a call where files that are read in it are not what they were; `values` are what it is given."""
        layers = range(len(self.plan.graph.layers))
        if 0 < len(self.moving) < len(layers) and is_away(values, self.targets[self.plan.run_on()[0]]):
            self._move(layers)
        if self.has.reads_files and self.weights.checkpoint is not None:
            self.weights.checkpoint.check_unchanged()
        if self.has.ahead is not None:
            self.has.ahead.begin()

    def recover(self) -> None:
        """Mend what a call that was interrupted between two hooks left behind."""
        self.moved.clear()
        caches = self.has.caches.values()
        take_off([*(stream.in_hand for stream in self.streams), *(cache.in_hand for cache in caches)])
        for stream in self.streams:
            stream.recover()
        if self.has.ahead is not None:
            self.has.ahead.end()

    def end_call(self) -> None:
        """Let go of what was held for one call."""
        self.moved.clear()
        if self.has.ahead is not None:
            self.has.ahead.end()

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
        if read and self.has.reads_files and self.weights.checkpoint is not None:
            self.weights.checkpoint.check_unchanged()
        for ring in self.has.rings.values():
            ring.close()
        for stream in self.streams:
            # What a call that was interrupted left in slots is no weight of the caller's.
            stream.recover()
        groups = [(group, group.load()) for group in self.has.groups.values() if read]
        experts = [(module, source, source.load() if read else None) for module, source in self.has.experts]
        # By what had them at first: adapters put modules of their own in between, and names change.
        mapped = {name: place.get(*self.owners[name]).clone() for name in self.has.mapped if read}
        own_device.untell(self.told)
        if self.session is not None:
            self.session.leave(self.model)
        for module in self.hooked:
            hooks.detach(module)
            vars(module).pop(GROUP_ATTRIBUTE, None)
        allow(self.model)
        resizing.leave(self.model)
        self.copies.detach()
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


def _acquirer(stream: GroupStream, group: StreamedGroup, alone: threading.RLock) -> hooks.Before:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Outside of a call of the model, as generate calls an encoder, nothing else keeps other threads out.
        is_outermost = not alone._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks it
        try:
            if is_outermost:
                alone.acquire()
                stream.locked_by = group
            stream.acquire(group)
        except BaseException:
            if is_outermost and alone._is_owned():  # type: ignore[attr-defined]
                stream.locked_by = None
                alone.release()
            raise
        return args, kwargs

    return before


def _reacher(ahead: ReadAhead, name: str) -> hooks.Before:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ahead.reach(name)
        return args, kwargs

    return before


def _releaser(stream: GroupStream, group: StreamedGroup, alone: threading.RLock) -> hooks.After:
    def after() -> None:
        try:
            stream.release(group)
        finally:
            if stream.locked_by is group:
                stream.locked_by = None
                alone.release()

    return after


def _offload(model: torch.nn.Module, plan: Plan, folder: str | Path | None) -> Waiting | None:
    """Write the disk homes of a loaded model to `folder`, when one is given."""
    names = waiting_on_disk(plan)
    return write(model, names, folder) if folder is not None and names else None
