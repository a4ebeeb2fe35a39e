"""How a model that runs as a plan says deals with what goes in and comes out of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """arguments: devices that modules, by their paths, have their arguments brought to.
    skip_keys: keyword arguments, and keys of what is returned, that are left where they are.
    returns: whether what the model returns is brought to where its first argument was.
    buffers_wait: whether buffers of groups that wait are copied with them, and not kept where these are used.
    keeps_training: parameters that stay go on taking gradients, if they did.
    """

    arguments: Mapping[str, torch.device] = field(default_factory=dict)
    skip_keys: Collection[str] = ()
    returns: bool = False
    buffers_wait: bool = False
    keeps_training: bool = False
