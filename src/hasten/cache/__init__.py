"""The KV cache: slots in reference-counted blocks, appended, committed, cropped, forked and released."""

from hasten.cache.cache import Cache
from hasten.cache.prefixes import Prefixes
from hasten.cache.recurrent import Replay, StatePerRow
from hasten.cache.sequence import RollbackError, Sequence, Snapshot

__all__ = ["Cache", "Prefixes", "Replay", "RollbackError", "Sequence", "Snapshot", "StatePerRow"]
