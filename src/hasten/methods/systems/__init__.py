"""Systems: speculation on several executors, and published systems that are no decoders of their own."""

from hasten.methods.systems import listed, mirror

__all__ = ["listed", "mirror"]
