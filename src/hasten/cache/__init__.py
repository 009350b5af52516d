"""The KV cache: slots in reference-counted blocks, appended, committed, cropped, forked and released."""

from hasten.cache.cache import Cache
from hasten.cache.prefixes import Prefixes
from hasten.cache.recurrent import Replay, RollbackError, StatePerRow
from hasten.cache.sequence import SequenceCache, Snapshot
from hasten.cache.slots import GroupCache, SlotCache

__all__ = [
    "Cache",
    "GroupCache",
    "Prefixes",
    "Replay",
    "RollbackError",
    "SequenceCache",
    "SlotCache",
    "Snapshot",
    "StatePerRow",
]
