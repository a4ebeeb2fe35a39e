"""One layer's fused experts, some on the device where the layer runs; the others are streamed when the router asks, or
computed by the CPU from where they wait: in host memory, or straight in a mapped file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set

import torch

from dispatch import place
from dispatch.away import away
from dispatch.expert_cache import ExpertCache
from dispatch.readahead import Bringing
from dispatch.saved_weights import SavedWeights, takes_hooks
from dispatch.scattered_tensor import ScatteredTensor
from dispatch.stores import HostStore, Store
from planner.errors import InputError

# Where one expert is: its tensors, if it is resident, or else the store that it waits in; neither in a mapped file.
ExpertPlace = tuple[dict[str, torch.Tensor], Store | None]


class _Experts(ABC):
    """What every source has for `planner.execution.routed_experts`: the module's parameters, and experts that are
    `resident` on the device, by their numbers.

    name: of the module. files: give a whole parameter as a view of the file that holds it; None where none does any
    more. writable: whether values can be written to where those that are not resident wait.
    """

    def __init__(
        self,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: Mapping[int, dict[str, torch.Tensor]],
        *,
        name: str,
        files: Mapping[str, Callable[[], torch.Tensor | None]] | None = None,
        writable: bool = True,
    ):
        self.owners, self.name, self.writable, self._resident = owners, name, writable, resident
        self._meta = {leaf: away(place.get(*owner), parameter=True) for leaf, owner in owners.items()}
        self._files = dict(files or {})
        self._brought: dict[str, torch.nn.Parameter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the module's parameters."""
        return tuple(f"{self.name}.{leaf}" for leaf in self.owners)

    @property
    def written(self) -> tuple[str, ...]:
        """The full names of parameters that no file holds as they are."""
        return tuple(f"{self.name}.{leaf}" for leaf in self.owners if leaf not in self._files)

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether it is in the middle of a call."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of what was copied, or is being read: it may have changed where it waits."""

    @abstractmethod
    def _waiting_part(self, expert: int, leaf: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of an expert's tensor that is not resident, flat, in host memory."""

    @abstractmethod
    def _waiting_place(self, expert: int, leaf: str) -> torch.Tensor:
        """Return an expert's tensor that is not resident where it waits, to be written to."""

    @property
    def is_away(self) -> bool:
        """Whether parameters are on meta, as `leave` put them."""
        return any(module._parameters.get(leaf) is self._meta[leaf] for module, leaf in self.owners.values())

    def bring(self) -> None:
        """Make the module's parameters tensors of all experts, each where it lies, until `leave`."""
        self._brought = {leaf: place.as_parameter(ScatteredTensor.of(_Fused(self, leaf))) for leaf in self.owners}
        for leaf, owner in self.owners.items():
            place.set_tensor(*owner, self._brought[leaf])

    def keep(self) -> None:
        """Write what was put in place of what `bring` made to where the experts lie.

        Raises:
            InputError: they wait in a file, or there is no such parameter any more.
        """
        for leaf, (module, _) in self.owners.items():
            found = module._parameters.get(leaf)
            if found is None:
                raise InputError(
                    f"{self.name}.{leaf} is no parameter any more, and its experts wait one by one: call "
                    "dispatch.remove before it is replaced by something else"
                )
            if found is not self._brought[leaf]:
                with torch.no_grad():
                    self._brought[leaf].copy_(found)

    def leave(self) -> None:
        """Put the module's parameters on meta: `fetch` gives what is computed with."""
        for name, (module, leaf) in self.owners.items():
            place.set_tensor(module, leaf, self._meta[name])
        self._brought = {}

    def restore(self, loaded: dict[str, torch.Tensor]) -> None:
        """Give the module what `load` returned, but for what somebody replaced or took away."""
        for name, owner in self.owners.items():
            if place.here(*owner) is self._meta[name]:
                place.put(*owner, loaded[name])

    def standing(self) -> dict[str, torch.Tensor]:
        """Return what stands for each whole parameter in the module."""
        return dict(self._meta)

    def check(self) -> None:
        """Raise InputError if somebody replaced one of the module's parameters."""
        place.check_away(self.owners, self._meta)

    def _whole(self, waiting: Mapping[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        whole = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in self._meta.items()}
        for expert, tensors in (*self._resident.items(), *waiting.items()):
            for name, tensor in tensors.items():
                whole[name][expert].copy_(tensor)
        return whole


class _Fused:
    """One parameter of a module, its experts in a row."""

    def __init__(self, experts: _Experts, leaf: str):
        self._experts, self._leaf = experts, leaf
        like = experts._meta[leaf]
        self.shape, self.dtype = tuple(like.shape), like.dtype
        found = experts._files.get(leaf)
        self._whole = None if found is None else found()

    def part(self, row: int, start: int, stop: int) -> torch.Tensor:
        if row in self._experts._resident:
            return self._experts._resident[row][self._leaf].reshape(-1)[start:stop].cpu()
        return self._experts._waiting_part(row, self._leaf, start, stop)

    def place(self, row: int) -> torch.Tensor:
        # No file holds what it is from now on.
        found = self._place(row)
        self._whole = None
        self._experts._files.pop(self._leaf, None)
        return found

    def _place(self, row: int) -> torch.Tensor:
        if row in self._experts._resident:
            return self._experts._resident[row][self._leaf]
        return self._experts._waiting_place(row, self._leaf)

    def whole(self) -> torch.Tensor | None:
        return self._whole if self._leaf in self._experts._files else None


class StreamedExperts(_Experts):
    """Those that are not resident wait in the stores of `waiting`, by their numbers. Copies of the routed experts that
    wait, and that are not in the `cache` still, begin as soon as the routing is known, as many at once as there are
    slots.

    In calls of at most `cpu_up_to_tokens` the CPU computes those that wait, and nothing is copied; without a cache it
    does so in every call. Then all of them wait in host memory.
    """

    def __init__(
        self,
        cache: ExpertCache | None,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: Mapping[int, dict[str, torch.Tensor]],
        waiting: Mapping[int, Store],
        *,
        name: str,
        files: Mapping[str, Callable[[], torch.Tensor | None]] | None = None,
        cpu_up_to_tokens: int = 0,
    ):
        writable = all(isinstance(store, HostStore) for store in waiting.values())
        super().__init__(owners, resident, name=name, files=files, writable=writable)
        self.cache, self.cpu_up_to_tokens = cache, cpu_up_to_tokens
        self._waiting = waiting
        self._saved = None if cache is None else SavedWeights(cache.in_hand, watched=False)
        self._keeps = False
        self._on_host: dict[int, dict[str, torch.Tensor]] = {}
        if cache is None or cpu_up_to_tokens:
            self._on_host = {n: store.views() for n, store in waiting.items() if isinstance(store, HostStore)}
            assert len(self._on_host) == len(waiting)

    @property
    def is_busy(self) -> bool:
        return self.cache is not None and self.cache.is_busy

    def forget(self) -> None:
        if self.cache is not None:
            self.cache.drop()

    def _waiting_part(self, expert: int, leaf: str, start: int, stop: int) -> torch.Tensor:
        return self._waiting[expert].part(leaf, start, stop)

    def _waiting_place(self, expert: int, leaf: str) -> torch.Tensor:
        store = self._waiting[expert]
        if not isinstance(store, HostStore):
            raise InputError(
                f"{self.name}.{leaf} waits in a file, which is not written to: let its experts wait on the 'cpu'"
            )
        # Gradients of what was computed with the values before are refused.
        store.changes += 1
        return store.views()[leaf]

    def by_expert(self) -> dict[int, ExpertPlace]:
        """Return where each expert is."""
        found: dict[int, ExpertPlace] = {expert: (tensors, None) for expert, tensors in self._resident.items()}
        return found | {expert: ({}, store) for expert, store in self._waiting.items()}

    def host_computes(self, tokens: int) -> Set[int]:
        """Return the experts that wait if the CPU computes them in a call of so many tokens, else none.

        A plan that has no slots for experts has no longer call; one that comes all the same is computed by the CPU too.
        """
        computes = self.cache is None or tokens <= self.cpu_up_to_tokens
        return self._waiting.keys() if computes else frozenset()

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Start copying those of `experts` that wait, in order. Layers run one after another.

        Raises:
            InputError: somebody replaced one of the module's parameters.
        """
        self.check()
        if self.cache is not None:
            self.cache.begin(self, [(expert, self._waiting[expert]) for expert in experts if expert in self._waiting])
        if self._saved is not None and torch.is_grad_enabled():
            self._keeps = not takes_hooks()
            if not self._keeps:
                self._saved.begin()

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors on the device; valid until the next `fetch` or `end`."""
        if expert in self._resident:
            if self.cache is not None:
                self.cache.end()
            return self._resident[expert]
        assert self.cache is not None
        assert self._saved is not None
        slab, store = self.cache.fetch(self, expert), self._waiting[expert]
        self._saved.lies_in(slab, store)
        return store.layout.views(slab.clone() if self._keeps else slab)

    def end(self) -> None:
        """Let go of the expert fetched last, however the call ended."""
        if self._saved is not None:
            self._saved.end()
            self._keeps = False
        if self.cache is not None:
            self.cache.end()

    def on_host(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors in the host's memory, where they wait."""
        return self._on_host[expert]

    def load(self) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        return self._whole({expert: store.to_host() for expert, store in self._waiting.items()})


class MappedExperts(_Experts):
    """The CPU computes with those that are not resident straight from the mapped file. What of the routed ones is not
    in the page cache is read as soon as the routing is known, ahead of computing.
    """

    def __init__(
        self,
        owners: dict[str, tuple[torch.nn.Module, str]],
        resident: Mapping[int, dict[str, torch.Tensor]],
        mapped: Mapping[int, dict[str, torch.Tensor]],
        *,
        name: str,
        files: Mapping[str, Callable[[], torch.Tensor | None]] | None = None,
    ):
        """Take the experts by their numbers."""
        super().__init__(owners, resident, name=name, files=files, writable=False)
        self._mapped = mapped
        self._pages = {expert: (f"{name} {expert}", tuple(tensors.values())) for expert, tensors in mapped.items()}
        self._bringing: Bringing | None = None

    @property
    def is_busy(self) -> bool:
        return self._bringing is not None

    def forget(self) -> None:
        self.end()

    def _waiting_part(self, expert: int, leaf: str, start: int, stop: int) -> torch.Tensor:
        return self._mapped[expert][leaf].reshape(-1)[start:stop]

    def _waiting_place(self, expert: int, leaf: str) -> torch.Tensor:
        # Pages that are written to stay in memory, as those of whole groups do.
        return self._mapped[expert][leaf]

    def by_expert(self) -> dict[int, ExpertPlace]:
        """Return where each expert is: in memory, where a file no longer holds them all as they are."""
        found: dict[int, ExpertPlace] = {expert: (tensors, None) for expert, tensors in self._resident.items()}
        return found | {expert: ({} if not self.written else held, None) for expert, held in self._mapped.items()}

    def host_computes(self, tokens: int) -> Set[int]:
        """Return none: they are where the layer runs."""
        return frozenset()

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Begin to read those of `experts` that are not there, in order.

        Raises:
            InputError: somebody replaced one of the module's parameters.
        """
        self.check()
        self.end()
        self._bringing = Bringing.of(dict(self._pages[expert] for expert in experts if expert in self._pages))

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors.

        Raises:
            InputError: it cannot be read any more.
        """
        if expert in self._resident:
            return self._resident[expert]
        if self._bringing is not None:
            self._bringing.reach(self._pages[expert][0])
        return self._mapped[expert]

    def end(self) -> None:
        """Stop reading."""
        if self._bringing is not None:
            self._bringing.stop()
            self._bringing = None

    def on_host(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors."""
        return self.fetch(expert)

    def load(self) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        return self._whole(self._mapped)
