"""The KV cache: slots in reference-counted blocks, appended, committed, cropped, forked and released."""

from hasten.cache.cache import Cache
from hasten.cache.sequence import RollbackError, Sequence, Snapshot

__all__ = ["Cache", "RollbackError", "Sequence", "Snapshot"]
