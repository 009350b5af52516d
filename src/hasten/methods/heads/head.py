"""What all heads have in common: the target's hidden state behind the last token that it has read, per request."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.engine import Draft, Drafter, Observation, Request, Target
from hasten.errors import UserError
from hasten.methods.heads.guesses import Guesses
from hasten.methods.heads.shipped import shipped_head
from hasten.methods.heads.sizing import Sizing
from hasten.model import Decoder, Taps
from hasten.model.config import ModelConfig
from hasten.model.decoder import Backend, TorchBackend
from hasten.model.linear import Linear
from hasten.model.native import NativeBackend
from hasten.model.native.linear import Panels
from hasten.model.native.rounding import Rounded
from hasten.model.taps import Site
from hasten.model.weights import HEAD, Piece, Pieces, Source

FINAL: tuple[Site, int] = ("final_norm", 0)
"""What the target's own head reads."""
FOLDER = "heads"
"""Beside a checkpoint, where its heads are: `heads/medusa`; for a GGUF file `NAME.gguf.heads/medusa`."""


def require_decoder(target: Target, slug: str) -> Decoder:
    """The target's network.

    Raises:
        UserError: it has none.
    """
    if not isinstance(target.model, Decoder):
        raise UserError(f"{slug} reads hidden states, and this model has none")
    return target.model


def backend_of(target: Decoder) -> Backend:
    """A backend for what stands on a target: native where that is.

    There, matrices in bfloat16 become int8 blocks: half the bytes, and what is drafted hardly changes.
    """
    own = target.backend
    if not isinstance(own, NativeBackend):
        return TorchBackend()
    small: Rounded | None = "Q8_0" if target.dtype == torch.bfloat16 else None
    return NativeBackend(target.dtype, own.layers or small, own.head or small)


def linear_of(target: Decoder, piece: Piece, source: Source = HEAD) -> Linear:
    """A matrix of a head, by the backend of such; what is stored in blocks stays as it is."""
    backend = backend_of(target)
    if piece.stored and isinstance(backend, NativeBackend):
        backend = NativeBackend(target.dtype)
    return backend.linear(piece.to(target.dtype, target.device), source)


def layer_of(
    target: Decoder, config: ModelConfig, pieces: Mapping[str, Piece], without: frozenset[str] = frozenset()
) -> Pieces:
    """The one layer of a head's own, its matrices by `linear_of`.

    Args:
        config: of the decoder that has it.
        pieces, without: as `Pieces` has them.
    """
    matrices = {name: piece for name, piece in pieces.items() if len(piece.shape) == 2}
    norms = {name: piece.to(target.dtype, target.device) for name, piece in pieces.items() if name not in matrices}
    linears = {name: linear_of(target, piece, Source(name, 0)) for name, piece in matrices.items()}
    return Pieces(config, 0, norms, linears, without)


def logits_of(output: Linear, rows: Tensor) -> Tensor:
    """[rows, words]; float32 where the matrix is native, which rounds them only for rows of another dtype."""
    return output.forward(rows.float() if isinstance(output, Panels) else rows)


def own_head(slug: str) -> Any:
    """Where a target's own head is: `Method.defaults` of a method whose parameter `head` names a folder.

    One beside the checkpoint goes before one that comes with hasten.
    """

    def defaults(target: Target) -> dict[str, Any]:
        folder = None if target.folder is None else beside(Path(target.folder), slug)
        if folder is None or not folder.is_dir():
            folder = shipped_head(slug, target.model) if isinstance(target.model, Decoder) else None
        return {} if folder is None else {"head": str(folder)}

    return defaults


def beside(checkpoint: Path, slug: str) -> Path:
    """The folder of a checkpoint's head."""
    if checkpoint.suffix == ".gguf":
        return checkpoint.with_name(f"{checkpoint.name}.{FOLDER}") / slug
    return checkpoint / FOLDER / slug


class HeadDrafter(Drafter):
    """Drafts from a state per request, of all requests at once.

    Args:
        guesses: children of its nodes.
        sizing: cuts drafts to what pays; None leaves them whole.
    """

    def __init__(self, guesses: Guesses, sizing: Sizing | None = None) -> None:
        self.guesses, self.sizing = guesses, sizing

    @abstractmethod
    def draft(self, requests: Sequence[Request], states: Tensor, budgets: Sequence[int]) -> list[Draft]:
        """A draft per request.

        Args:
            requests: that were read.
            states: [requests, width], as `states` gives them.
            budgets: nodes of each draft at most.
        """

    @abstractmethod
    def knows(self, request: Request) -> bool:
        """Whether all of a request was shown that a draft needs."""

    @abstractmethod
    def states(self, requests: Sequence[Request]) -> Tensor:
        """[requests, width]: what drafts of requests that it knows begin with."""

    def prepare(self) -> None:
        if self.sizing is not None:
            self.sizing.prepare()

    def propose(self, request: Request, budget: int) -> Draft:
        return self.propose_all([request], [budget])[0]

    def propose_all(self, requests: Sequence[Request], budgets: Sequence[int]) -> list[Draft]:
        drafts = {request.id: Draft() for request in requests}
        read = [
            (request, budget)
            for request, budget in zip(requests, budgets, strict=True)
            if budget > 0 and self.knows(request)
        ]
        if read:
            known, allowed = zip(*read, strict=True)
            self.guesses.begin(known)
            with torch.inference_mode():
                made = self.draft(known, self.states(known), allowed)
            if self.sizing is not None:
                made = self.sizing.cut(known, made)
            drafts |= {request.id: draft for request, draft in zip(known, made, strict=True)}
        return [drafts[request.id] for request in requests]

    def observe(self, request: Request, seen: Observation) -> None:
        self.guesses.observe(request, seen)
        if self.sizing is not None:
            self.sizing.learn(request, seen)

    def end(self, request: Request) -> None:
        self.guesses.end(request)
        if self.sizing is not None:
            self.sizing.end(request)


class StateDrafter(HeadDrafter):
    """Drafts from the final state of the last row that the target has read of each request.

    State per request: that row, [hidden], in the target's dtype. The root of its draft is what the target said to it.

    Args:
        target: the network.
        guesses, sizing: see `HeadDrafter`.
    """

    taps: ClassVar[tuple[tuple[Site, int], ...]] = (FINAL,)  # type: ignore[misc]

    def __init__(self, target: Decoder, guesses: Guesses, sizing: Sizing | None = None) -> None:
        super().__init__(guesses, sizing)
        self._states: dict[int, Tensor] = {}
        self._state_bytes = target.config.hidden_size * target.dtype.itemsize

    @property
    def reads_whole(self) -> bool:
        # It looks at the last row only.
        return False

    @property
    def memory_bytes(self) -> int:
        return self._state_bytes * len(self._states)

    def growth_bytes(self, requests: Sequence[Request], rows: int = 0) -> int:
        return self._state_bytes * sum(request.id not in self._states for request in requests)

    def knows(self, request: Request) -> bool:
        return request.id in self._states

    def states(self, requests: Sequence[Request]) -> Tensor:
        return torch.stack([self._states[request.id] for request in requests])

    def observe_prompt(self, request: Request, start: int, taps: Taps | None) -> None:
        assert taps is not None
        self._states[request.id] = taps[FINAL][-1].clone()

    def observe(self, request: Request, seen: Observation) -> None:
        row = seen.path[-1] + 1 if seen.path else 0
        self._states[request.id] = seen.taps[FINAL][row].clone()
        super().observe(request, seen)

    def end(self, request: Request) -> None:
        self._states.pop(request.id, None)
        super().end(request)
