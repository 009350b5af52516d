"""The KV cache: slots in reference-counted blocks, appended, committed, cropped, forked and released."""

from hasten.cache.cache import Cache
from hasten.cache.prefixes import Prefixes
from hasten.cache.recurrent import Replay, StatePerRow
from hasten.cache.sequence import RollbackError, SequenceCache, Snapshot

__all__ = ["Cache", "Prefixes", "Replay", "RollbackError", "SequenceCache", "Snapshot", "StatePerRow"]
