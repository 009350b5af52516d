"""What a request keeps of what was said: fewer tokens of its prompt, fewer or smaller slots."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.cache import Cache, GroupCache, SequenceCache, SlotCache
from hasten.engine.prompt import Segment
from hasten.engine.request import Request
from hasten.model.layout import Group, Layout


class ContextPolicy:
    """Chosen beside the drafter; one object serves all requests of an engine with the same policy and parameters.

    By default nothing is left out: a cache policy overrides `group_cache` (and perhaps `layout`), a prompt reducer
    `reduce`. Drafters give a policy's own tokens if these do not depend on how rows come together in passes: a row's
    attention must be the same beside any other pending rows, and what is made of slots must follow from committed rows.
    """

    layout: Layout | None = None
    """Groups of layers that keep other slots than each other; None: all layers of one shape are a group."""

    def reduce(self, prompt: Sequence[Segment]) -> Sequence[Segment]:
        """The prompt as it is read. Called before the request is added, beside the steps of others.

        Raises:
            UserError: a prompt that it cannot be applied to.
        """
        return prompt

    def group_cache(self, cache: Cache, group: Group) -> GroupCache:
        """What a sequence keeps for a group of layers."""
        return SlotCache(cache, group)

    def sequence(self, cache: Cache) -> SequenceCache:
        """An empty sequence."""
        return cache.sequence(self.layout, self.group_cache)

    def committed(self, request: Request) -> None:
        """Rows of a request were committed: `request.read` of its tokens are in the cache, for good.

        The last draft's rows beyond a stop are, too, but then the request is over and this is not called.
        """


EVERYTHING = ContextPolicy()
"""Keeps all that was said."""
