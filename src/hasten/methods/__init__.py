"""The methods that come with hasten; importing this package registers them.

The package shares its name with `hasten.methods()`, the listing, and takes its place as soon as it is imported: so it
can be called as well.
"""

import sys
from collections.abc import Mapping
from types import ModuleType

from hasten.engine import registry
from hasten.methods import diffusion, drafters, heads, skipping, systems

__all__ = ["diffusion", "drafters", "heads", "skipping", "systems"]


class _Methods(ModuleType):
    def __call__(self) -> Mapping[str, registry.Method]:
        """All registered methods by slug."""
        return registry.methods()


sys.modules[__name__].__class__ = _Methods
