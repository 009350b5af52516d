"""The texts of running requests as they grow: an index of each one, and its response among those of its tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.engine import Request
from hasten.methods.drafters.suffix_index import SuffixIndex
from hasten.methods.drafters.suffix_store import ResponseStore


@dataclass
class RunningText:
    """A request: its own index and sequence there, its response in the store (if there is one), and tokens read."""

    index: SuffixIndex
    sequence: int
    response: int | None
    read: int = 0


class Texts:
    """Reads what requests committed, when it is asked to.

    Prompts go to a request's own index only, never to what others look up.

    Args:
        depth: of the indices.
        store: of responses; None keeps none.
    """

    def __init__(self, depth: int, store: ResponseStore | None) -> None:
        self.depth, self.store = depth, store
        self.running: dict[int, RunningText] = {}

    @property
    def memory_bytes(self) -> int:
        own = sum(text.index.memory_bytes for text in self.running.values())
        return own + (self.store.memory_bytes if self.store is not None else 0)

    def growth_bytes(self, requests: Sequence[Request]) -> int:
        """What reading these requests adds at most."""
        grown = 0
        for request in requests:
            text = self.running.get(request.id)
            tokens = len(request.tokens) - (text.read if text is not None else 0)
            grown += text.index.growth_bytes(tokens) if text is not None else SuffixIndex.fresh_bytes(tokens)
            if self.store is not None:
                shared = self.responses(request)
                grown += shared.growth_bytes(tokens) if shared is not None else SuffixIndex.fresh_bytes(tokens)
        return grown

    def read(self, request: Request) -> RunningText:
        """Count the tokens that were committed since."""
        text = self.running.get(request.id)
        if text is None:
            index = SuffixIndex(self.depth)
            response = self.store.open(request.params.tenant) if self.store is not None else None
            text = self.running[request.id] = RunningText(index, index.add(), response)
        text.index.extend(text.sequence, request.tokens[text.read :])
        if self.store is not None and text.response is not None:
            self.store.extend(text.response, request.tokens[max(text.read, request.prompt_length) :])
        text.read = len(request.tokens)
        return text

    def responses(self, request: Request) -> SuffixIndex | None:
        """What the request's tenant was answered, this response included; None before there is any."""
        return self.store.index(request.params.tenant) if self.store is not None else None

    def end(self, request: Request) -> None:
        """Keep the response; one that never began is nothing."""
        if request.id not in self.running and len(request.tokens) == request.prompt_length:
            return
        text = self.read(request)
        if self.store is not None and text.response is not None:
            self.store.close(text.response)
        del self.running[request.id]
