"""Copies and pickles of a dispatched model, which are dispatched as it is; and of its parts: plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dispatch import place, resizing
from dispatch.away import AWAY
from dispatch.checkpoint import Checkpoint
from dispatch.conventions import Conventions
from dispatch.experts import ExpertPlace
from dispatch.limits import OnExceed
from dispatch.plain_copy import COPYING, Memo, Pickled, attributes, itself, plain_copy, tensors_below
from dispatch.replan import Given
from dispatch.stores import DiskStore, HostStore, Store
from dispatch.targets import is_here
from dispatch.weights import Weights
from planner.errors import InputError
from planner.graph import full_name
from planner.plan import Plan

if TYPE_CHECKING:
    from dispatch.dispatched import Dispatched

_CPU = torch.device("cpu")
_Key = tuple[str, str]
# Makes the model of (a blueprint,) run as the one that it is a copy of.
Revive = Callable[[Any], torch.nn.Module]


class Here:
    """The devices that a model runs on, by the plan's names. Read from a pickle, they are looked for first.

    Raises:
        InputError: this machine lacks one.
    """

    def __init__(self, targets: Mapping[str, torch.device]):
        self.targets = dict(targets)
        missing = [f"{name} ({device})" for name, device in self.targets.items() if not is_here(device)]
        if missing:
            raise InputError(
                f"the model that was pickled runs on {', '.join(missing)}, and this machine has no such device: read "
                "it where there is one, or pickle it after dispatch.remove, or save_pretrained it, and dispatch it here"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Here, (self.targets,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model without hooks, and what makes it run as the dispatched one that it is a copy of.

    here: first, so that a missing device is told of before tensors on it are read. parts: modules by the paths that the
    plan knows them by. names: of all tensors. stores, experts: where what waits does, by layer and group. mapped: names
    of what is used straight from mapped files; unwritten: of those that the model does not hold. written: of experts
    that no file holds as they are.
    on_exceed, given: of `dispatch.apply`, None without it. served: calls pass through a session. before: the
    implementations that the plan's took the place of. device_map: that the model says it runs by.
    """

    here: Here
    model: torch.nn.Module
    plan: Plan
    conventions: Conventions
    weights: Weights
    parts: dict[str, torch.nn.Module]
    names: tuple[str, ...]
    stores: dict[_Key, Store]
    experts: dict[_Key, dict[int, ExpertPlace]]
    mapped: list[str]
    unwritten: list[str]
    written: tuple[str, ...]
    on_exceed: OnExceed | None
    given: Given | None
    served: bool
    before: dict[str, Any]
    device_map: dict[str, Any] | None


class Copies:
    """Lets `copy.deepcopy` and `pickle` take a dispatched model and its parts.

    revive: takes (blueprint,) and returns its model, made to run. It is called wherever a pickle is read.
    """

    def __init__(self, state: Dispatched, revive: Revive):
        self._state, self._revive = state, revive

    def attach(self, *, parts: bool) -> None:
        """Stand on the model's instance, and with `parts` on those of all modules in it."""
        for module in self._state.parts.values() if parts else ():
            vars(module).update(
                __deepcopy__=partial(self._copied_part, module), __reduce_ex__=partial(self._pickled_part, module)
            )
        vars(self._state.model).update(__deepcopy__=self._copied, __reduce_ex__=self._pickled)

    def detach(self) -> None:
        """Let the model and its parts be copied as plain ones are."""
        for module in (self._state.model, *self._state.parts.values()):
            for name in COPYING:
                vars(module).pop(name, None)

    def _copied(self, memo: Memo) -> torch.nn.Module:
        made = self._revive((self._blueprint(memo, shared=False),))
        new: Dispatched = vars(made)["_loadplan_dispatch"]
        for key, group in self._state.has.groups.items():
            # Whoever else has these, as an optimizer of all parameters, gets the copy's.
            others = new.has.groups[key].standing()
            memo.update({id(tensor): others[name][0] for name, (tensor, _) in group.standing().items()})
        return made

    def _pickled(self, protocol: Any) -> tuple[Any, ...]:
        return self._revive, (Pickled(self._blueprint({}, shared=True)),)

    def _copied_part(self, module: torch.nn.Module, memo: Memo) -> Any:
        if id(self._state) in memo:
            return self._plain(module, memo)
        with self._settled():
            # Of what else it holds, a copy of the whole model that may follow makes its own.
            inside = dict(memo)
            self._fill(module, inside, shared=False)
            made = self._plain(module, inside)
            known = (*module.modules(), *tensors_below(module))
            memo.update({id(one): inside[id(one)] for one in known if id(one) in inside})
            return made

    def _pickled_part(self, module: torch.nn.Module, protocol: Any) -> tuple[Any, ...]:
        with self._settled():
            memo: Memo = {id(tensor): tensor for tensor in tensors_below(module)}
            self._fill(module, memo, shared=True)
            return itself(self._plain(module, memo))

    def _blueprint(self, memo: Memo, *, shared: bool) -> Blueprint:
        """Return what a copy is made of. shared: its tensors are this model's own, else they are copied.

        Raises:
            InputError: the model is in the middle of a call or of `weights_at_home`, or its files are not what they
                were.
        """
        state = self._state
        has, weights = state.has, state.weights
        with self._settled():
            self._check_settled()
            checkpoint = weights.checkpoint if has.reads_files else None
            if checkpoint is not None:
                checkpoint.check_unchanged()
                checkpoint = checkpoint if shared else checkpoint.again()
            # A part that was copied by itself is another one's.
            for module in state.model.modules():
                memo.pop(id(module), None)
            memo[id(state)] = state
            if shared:
                memo.update({id(tensor): tensor for tensor in tensors_below(state.model)})
            unwritten = [name for name in has.mapped if weights.is_as_mapped(name, self._current(name))]
            self._empty(memo, unwritten)
            model = self._plain(state.model, memo)
            parts = {path: copy.deepcopy(module, memo) for path, module in state.parts.items()}
            stores = _Stores(state, checkpoint, shared=shared)
            owners = {name: place.owner_in(parts, name) for name in state.owners}
            again = weights.again(model, checkpoint, owners)
            again.changed |= bool(state.written())
            session = state.session
            return Blueprint(
                here=Here(state.targets),
                model=model,
                plan=state.plan,
                # What takes gradients is the copy's own word by now.
                conventions=replace(state.conventions, keeps_training=True),
                weights=again,
                parts=parts,
                names=tuple(state.owners),
                stores={key: stores.of(key, group.store) for key, group in has.groups.items()},
                experts=stores.of_experts(),
                mapped=list(has.mapped),
                unwritten=unwritten,
                written=tuple(name for _, source in has.experts for name in source.written),
                on_exceed=session.limits.on_exceed if session is not None and session.limits is not None else None,
                given=state.given,
                served=session is not None,
                before=dict(state.before),
                device_map=vars(state.model).get("hf_device_map"),
            )

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Keep calls out, and have what an interrupted one left behind mended."""
        alone: Any = self._state.alone
        is_outermost = not alone._is_owned()  # as threading.Condition asks it
        with alone:
            if is_outermost:
                self._state.recover()
            yield

    def _check_settled(self) -> None:
        sources = [source for _, source in self._state.has.experts]
        if any(each.is_busy for each in (*self._state.streams, *sources)):
            raise InputError("a dispatched model was to be copied in the middle of a call; wait for its end")
        for each in (*self._state.has.groups.values(), *sources):
            if not each.is_away:
                raise InputError(
                    "a dispatched model was to be copied while its weights are at home: copy it after that block; "
                    "parts can be copied inside"
                )
            each.check()

    def _empty(self, memo: Memo, unwritten: list[str]) -> None:
        """Have the copy hold nothing of what waits: plain tensors on meta, which say whether they are trained."""
        for group in self._state.has.groups.values():
            for tensor, trained in group.standing().values():
                memo[id(tensor)] = _empty_like(tensor, trained)
        for _, source in self._state.has.experts:
            memo.update({id(tensor): _empty_like(tensor, False) for tensor in source.standing().values()})
        for name in unwritten:
            current = self._current(name)
            trained = current.requires_grad if isinstance(current, torch.nn.Parameter) else None
            memo[id(current)] = _empty_like(current, trained)

    def _fill(self, module: torch.nn.Module, memo: Memo, *, shared: bool) -> None:
        """Have a copy of a part hold what waits of it, in host memory; what is tied there is one tensor.

        shared: over the memory or the mapped files that it waits in, where these hold it as it is.
        """
        below = {id(tensor) for tensor in tensors_below(module)}
        first = self._state.plan.graph.tied_to_earlier()
        made: dict[str, torch.Tensor] = {}
        for group in self._state.has.groups.values():
            missing = {n: id(t) for n, (t, _) in group.standing().items() if id(t) in below and _lacks(memo, t)}
            values = (group.on(_CPU) if shared else group.load()) if missing else {}
            memo.update({key: made.setdefault(first.get(name, name), values[name]) for name, key in missing.items()})
        for _, source in self._state.has.experts:
            standing = source.standing()
            if any(id(tensor) in below and _lacks(memo, tensor) for tensor in standing.values()):
                whole = source.load()
                memo.update({id(tensor): place.as_parameter(whole[leaf]) for leaf, tensor in standing.items()})

    def _plain(self, module: torch.nn.Module, memo: Memo) -> Any:
        state = self._state
        own = attributes(module)
        if module is state.model:
            for name in ("_apply", "state_dict", "load_state_dict", resizing.NAME) if state.waits else ():
                own.pop(name, None)
            if state.session is not None and "generate" in own:
                own["generate"] = state.session.own_generate(module)
                if own["generate"] is None:
                    del own["generate"]
        kind = next((kind for told, kind in state.told if told is module), None)
        return plain_copy(module, memo, kind=kind, own=own)

    def _current(self, name: str) -> torch.Tensor:
        module, leaf = self._state.owners[name]
        found = module._parameters.get(leaf) if leaf in module._parameters else module._buffers[leaf]
        assert found is not None
        return found


class _Stores:
    """Where a copy's weights wait. shared: where the model's own do, but for what is read from files."""

    def __init__(self, state: Dispatched, checkpoint: Checkpoint | None, *, shared: bool):
        self._state, self._checkpoint, self._shared = state, checkpoint, shared
        self._placements = {(p.layer, p.group): p for p, _, _ in state.has.placed}

    def of(self, key: _Key, store: Store) -> Store:
        """Return the copy's of a store of a group, or of one expert of it."""
        if isinstance(store, DiskStore):
            assert self._checkpoint is not None
            return store.of(self._checkpoint)
        if self._shared or not isinstance(store, HostStore):
            return store
        placement = self._placements[key]
        return store.copied(self._state.targets[placement.run_on], pinned=placement.memory != "pageable")

    def of_experts(self) -> dict[_Key, dict[int, ExpertPlace]]:
        """Return where the copy's experts are, of groups of which some wait, under full names."""
        sources = {id(module): source for module, source in self._state.has.experts}
        found: dict[_Key, dict[int, ExpertPlace]] = {}
        for key in self._placements:
            path = full_name(*key)
            source = sources.get(id(self._state.parts.get(path)))
            if source is None:
                continue
            names = {leaf: f"{path}.{leaf}" for leaf in source.standing()}
            found[key] = {
                expert: (
                    {names[leaf]: tensor if self._shared else tensor.clone() for leaf, tensor in tensors.items()},
                    None if store is None else self.of(key, store).renamed(names),
                )
                for expert, (tensors, store) in source.by_expert().items()
            }
        return found


def _lacks(memo: Memo, tensor: torch.Tensor) -> bool:
    """Tell whether no values are known that take the place of what stands for a weight."""
    return isinstance(memo.get(id(tensor), tensor), AWAY)


def _empty_like(tensor: torch.Tensor, trained: bool | None) -> torch.Tensor:
    """Return a plain tensor on meta, in the same order; a parameter, unless `trained` is None."""
    empty = place.empty(tensor, torch.device("meta"))
    return empty if trained is None else place.as_parameter(empty, requires_grad=trained)
