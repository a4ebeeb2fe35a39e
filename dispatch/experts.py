"""One layer's fused experts, some on the device where the layer runs; the others are streamed when the router asks, or
computed by the CPU from where they wait: in host memory, or straight in a mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

from dispatch import place
from dispatch.away import away
from dispatch.expert_cache import ExpertCache
from dispatch.readahead import Bringing
from dispatch.stores import HostStore, Store

# Where one expert is: its tensors, if it is resident, or else the store that it waits in; neither in a mapped file.
ExpertPlace = tuple[dict[str, torch.Tensor], Store | None]


class _Experts:
    """What every source has for `planner.execution.routed_experts`: the module's parameters, and experts that are
    `resident` on the device, by their numbers.
    """

    def __init__(self, owners: dict[str, tuple[torch.nn.Module, str]], resident: Mapping[int, dict[str, torch.Tensor]]):
        self.owners, self._resident = owners, resident
        self._meta = {name: away(place.get(*owner), parameter=True) for name, owner in owners.items()}

    def leave(self) -> None:
        """Put the module's parameters on meta: `fetch` gives what is computed with."""
        for name, (module, leaf) in self.owners.items():
            place.set_tensor(module, leaf, self._meta[name])

    def restore(self, loaded: dict[str, torch.Tensor]) -> None:
        """Give the module what `load` returned."""
        for name, owner in self.owners.items():
            place.put(*owner, loaded[name])

    def standing(self) -> dict[str, torch.Tensor]:
        """Return what stands for each whole parameter in the module."""
        return dict(self._meta)

    def _check(self) -> None:
        """Raise InputError if somebody replaced one of the module's parameters."""
        place.check_away(self.owners, self._meta)

    def _whole(self, waiting: Mapping[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the whole parameters, all experts of them, in host memory."""
        whole = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in self._meta.items()}
        for expert, tensors in (*self._resident.items(), *waiting.items()):
            for name, tensor in tensors.items():
                whole[name][expert].copy_(tensor)
        return whole


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
        cpu_up_to_tokens: int = 0,
    ):
        super().__init__(owners, resident)
        self.cache, self.cpu_up_to_tokens = cache, cpu_up_to_tokens
        self._waiting = waiting
        self._on_host: dict[int, dict[str, torch.Tensor]] = {}
        if cache is None or cpu_up_to_tokens:
            self._on_host = {n: store.views() for n, store in waiting.items() if isinstance(store, HostStore)}
            assert len(self._on_host) == len(waiting)

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
        self._check()
        if self.cache is not None:
            self.cache.begin(self, [(expert, self._waiting[expert]) for expert in experts if expert in self._waiting])

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors on the device; valid until the next `fetch` or `end`."""
        if expert in self._resident:
            self.end()
            return self._resident[expert]
        assert self.cache is not None
        return self._waiting[expert].layout.views(self.cache.fetch(self, expert))

    def end(self) -> None:
        """Let go of the expert fetched last."""
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
    ):
        """Take the experts by their numbers; name: of the module, for errors."""
        super().__init__(owners, resident)
        self._mapped = mapped
        self._pages = {expert: (f"{name} {expert}", tuple(tensors.values())) for expert, tensors in mapped.items()}
        self._bringing: Bringing | None = None

    def by_expert(self) -> dict[int, ExpertPlace]:
        """Return where each expert is."""
        found: dict[int, ExpertPlace] = {expert: (tensors, None) for expert, tensors in self._resident.items()}
        return found | {expert: ({}, None) for expert in self._mapped}

    def host_computes(self, tokens: int) -> Set[int]:
        """Return none: they are where the layer runs."""
        return frozenset()

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Begin to read those of `experts` that are not there, in order.

        Raises:
            InputError: somebody replaced one of the module's parameters.
        """
        self._check()
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
