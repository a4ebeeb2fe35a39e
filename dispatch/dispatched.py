"""What is done to one model so that it runs as a Plan says, and undone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from dispatch import accelerate_hooks, hooks, own_device, place, resizing
from dispatch.conventions import Conventions
from dispatch.copying import Copies, Revive
from dispatch.learned_order import LearnedStream
from dispatch.limits import Limits
from dispatch.measure import NAMES_ATTRIBUTE, plan_names
from dispatch.mover import Boundary, Moved, handed_over, is_away, mover
from dispatch.preparation import Preparation
from dispatch.progress import loading_bar
from dispatch.readahead import ReadAhead
from dispatch.refusals import allow, refuse
from dispatch.replan import Given
from dispatch.saved_weights import take_off
from dispatch.session import Dispatch, Session
from dispatch.stream import GroupStream, StreamedGroup
from dispatch.weights import Weights
from dispatch.whole_state import WholeState
from planner import execution as implementations
from planner.errors import InputError
from planner.plan import Plan
from planner.steps import layer_runs

# On a dispatched model: what was done to it.
ATTRIBUTE = "_loadplan_dispatch"
# On a module whose weights are streamed: (their stream, their group).
GROUP_ATTRIBUTE = "_loadplan_group"
# On a model that runs by a device map: the map.
MAP_ATTRIBUTE = "hf_device_map"
# On a whole model that waits in host memory until it is called: what brings it.
WHOLE_ATTRIBUTE = "_loadplan_whole"


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
        accelerate_hooks.check(path, module)


def state_of(model: torch.nn.Module) -> Dispatched:
    """Return what was done to a model, or to the one inside it.

    Raises:
        InputError: nothing was.
    """
    place.check_module(model)
    for each in model.modules():
        if ATTRIBUTE in vars(each):
            state: Dispatched = vars(each)[ATTRIBUTE]
            return state
    raise InputError("this model is not dispatched")


def is_dispatched(model: torch.nn.Module) -> bool:
    return getattr(model, ATTRIBUTE, None) is not None


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
        revive: Revive,
        given: Given | None = None,
        parts: dict[str, torch.nn.Module] | None = None,
        names: Iterable[str] | None = None,
    ):
        """Take parts and names as they were where a model is a copy: adapters may have come between since.

        revive: makes a copy run, see `Copies`.
        """
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
        self.copies = Copies(self, revive)
        self.waits = False
        # What stays in its place: the object, and how often it was written to.
        self.stays: dict[str, tuple[int, int]] = {}

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
        self.has.check()
        with loading_bar(nbytes, shown=progress) as self.weights.loaded:
            self.has.load()
        self.run(limits, by_another, served=served)

    def run(self, limits: Limits | None, by_another: Dispatch | None = None, *, served: bool) -> None:
        """Make the model run with what was loaded."""
        self.attach()
        if self.waits or served:
            session = Session(
                limits, begin=self.begin_call, end=self.end_call, recover=torch.compiler.disable(self.recover),
                dispatch=by_another, lock=self.alone,
            )  # fmt: skip
            self.serve(session)
        if self.conventions.returns:
            hooks.attach_around(self.model, Boundary(self.conventions.skip_keys))
            self.hooked.append(self.model)
        setattr(self.model, ATTRIBUTE, self)
        setattr(self.model, NAMES_ATTRIBUTE, plan_names(self.plan, self.targets))
        self.copies.attach(parts=bool(self.hooked))

    def attach(self) -> None:
        """Make the model what was prepared."""
        self._set_implementations()
        stays = list(self.has.resident)
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
        self.stays = {name: _state_of(found) for name in stays if (found := self._kept(name)) is not None}

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

    def written(self) -> list[str]:
        """Return the names of what stays in its place, and was written to since, or replaced."""
        return [name for name, state in self.stays.items() if _state_of(self._kept(name)) != state]

    def _kept(self, name: str) -> torch.Tensor | None:
        """Return what a state dict would have under a name."""
        module, leaf = self.owners[name]
        return None if leaf in module._non_persistent_buffers_set else place.here(module, leaf)

    def parameter(self, name: str) -> torch.nn.Parameter | None:
        """Return the parameter that takes gradients under a name, or None."""
        found = place.here(*self.owners[name])
        return found if isinstance(found, torch.nn.Parameter) and found.requires_grad else None

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


def _state_of(tensor: torch.Tensor | None) -> tuple[int, int]:
    return id(tensor), 0 if tensor is None or tensor.is_inference() else tensor._version


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
