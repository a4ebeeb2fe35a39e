"""The state of a dispatched model as a whole: read where it waits, tensor by tensor, and never gathered in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from dispatch.experts import MappedExperts, StreamedExperts
from dispatch.stores import DiskStore
from dispatch.stream import GroupStream, StreamedGroup
from dispatch.weights import Weights
from planner.errors import InputError

_CPU = torch.device("cpu")


class WholeState:
    """`state_dict` and `load_state_dict` of a model whose weights wait in groups or expert by expert.

    streams: that groups pass through. experts: with the module of each source. ties: sets of names of one tensor, each
    with the module that has it. mapped: names of what is used straight from mapped files. alone: keeps calls out while
    it is held. weights: are told when values may have changed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        streams: Iterable[GroupStream],
        experts: Iterable[tuple[torch.nn.Module, MappedExperts | StreamedExperts]],
        *,
        ties: Iterable[Mapping[str, torch.nn.Module]],
        mapped: Iterable[str],
        alone: RLock,
        weights: Weights,
    ):
        self.model, self._streams, self._ties, self._alone = model, tuple(streams), tuple(ties), alone
        self._experts = tuple(source for _, source in experts)
        self._weights = weights
        self._read_only = set(mapped).union(*(source.names for source in self._experts if not source.writable))
        for stream in self._streams:
            for group in stream.groups:
                if isinstance(group.store, DiskStore):
                    self._read_only.update(group.names)

    def attach(self) -> None:
        """Let the model's own two functions be these, until they are taken off its instance."""
        vars(self.model).update(state_dict=self.state_dict, load_state_dict=self.load_state_dict)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the plain model's would hold: what waits in host memory as views of that, and what waits on disk
        as views of the mapped file, where a file holds it as it is. Tied names have one tensor. Fused experts that wait
        one by one are a tensor whose values come when they are asked for (`dispatch.scattered_tensor`).
        """
        with self.at_home():
            # The class's own: this stands on the instance.
            state = type(self.model).state_dict(self.model, *args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for owners in self._ties:
            # What was put in a module's place since is tied to nothing.
            names = [name for name, module in owners.items() if self._is_at(name, module)]
            found = [f"{prefix}{name}" for name in names if f"{prefix}{name}" in state]
            for other in found[1:]:
                if state[other].device == state[found[0]].device:
                    state[other] = state[found[0]]
        return state

    def _is_at(self, name: str, module: torch.nn.Module) -> bool:
        """Tell whether a tensor's name still leads to the module that had it."""
        try:
            return self.model.get_submodule(name.rpartition(".")[0]) is module
        except AttributeError:
            return False

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy values into the model where its weights wait, as the plain model's would.

        Raises:
            InputError: some of them wait in files, which are not written to, or `assign` is asked for.
        """
        if assign:
            raise InputError("load_state_dict(assign=True) would take weights from where they wait; leave it out")
        written = sorted(self._read_only & state_dict.keys())
        if written:
            raise InputError(
                f"{written[0]} and {len(written) - 1:,} more of these tensors wait in files, which are not written to: "
                "call dispatch.remove first, or dispatch the model from the checkpoint that has the new values"
            )
        # What is tied waits once for each of its names.
        state = dict(state_dict)
        for owners in self._ties:
            names = [name for name, module in owners.items() if self._is_at(name, module)]
            given = next((state[name] for name in names if name in state), None)
            if given is not None:
                state.update(dict.fromkeys(set(names) - state.keys(), given))
        with self.at_home():
            try:
                return type(self.model).load_state_dict(self.model, state, strict=strict)
            finally:
                self.drop()

    def drop(self) -> None:
        """Let go of what was copied to slots: it may have changed where it waits."""
        self._weights.changed = True
        for stream in self._streams:
            stream.drop()
        for source in self._experts:
            source.forget()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Have every parameter where it waits; inside of another such block nothing changes."""
        is_inside = self._alone._is_owned()  # type: ignore[attr-defined]  # as threading.Condition asks it
        with self._alone:
            asking = [source for source in self._experts if source.is_busy]
            for source in () if is_inside else asking:
                # Left by a call that was broken off.
                source.forget()
            if any(stream.is_busy for stream in self._streams) or (is_inside and asking):
                raise InputError(
                    "the state of a dispatched model was asked for in the middle of a call; wait for its end"
                )
            groups = [group for stream in self._streams for group in stream.groups if group.is_away]
            sources = [source for source in self._experts if source.is_away]
            brought: list[StreamedGroup | MappedExperts | StreamedExperts] = []
            try:
                for group in groups:
                    # What was put in place of a weight would be gone afterwards.
                    group.check()
                    brought.append(group)
                    group.bring(_CPU)
                for source in sources:
                    brought.append(source)
                    source.bring()
                yield
            finally:
                for each in brought:
                    each.leave()
