"""Taps hand out hidden states by named site and layer, for every row of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

from torch import Tensor

Site = Literal["input", "attention_input", "attention_output", "mlp_input", "output", "final_norm"]
"""`input` and `output` are the residual stream before and after a layer (before any norm); `attention_input`
and `mlp_input` are normed; `attention_output` is the attention's contribution; `final_norm` belongs to no
layer (use 0)."""


class Taps:
    """Ask for `(site, layer)` pairs before a forward pass, read `[rows, hidden]` tensors after it.

    Attributes:
        listeners: each is called with its site's tensor while the pass goes on, as soon as the backend can: a native
            pass pauses for what enters a layer, and tells of other sites at its end. It must run no model.

    Raises:
        ValueError: an unknown site.
    """

    def __init__(self, wanted: Iterable[tuple[Site, int]]) -> None:
        self.wanted = frozenset(wanted)
        for site, _ in self.wanted:
            if site not in get_args(Site):
                raise ValueError(f"unknown tap site {site!r}; the sites are {', '.join(get_args(Site))}")
        self.states: dict[tuple[Site, int], Tensor] = {}
        self.listeners: dict[tuple[Site, int], Callable[[Tensor], None]] = {}

    def __getitem__(self, key: tuple[Site, int]) -> Tensor:
        return self.states[key]

    def put(self, site: Site, layer: int, state: Tensor) -> None:
        """Called by the model; keeps the tensor if it was asked for, and tells who listens."""
        if (site, layer) in self.wanted:
            self.states[site, layer] = state
        listener = self.listeners.get((site, layer))
        if listener is not None:
            listener(state)
