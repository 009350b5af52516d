"""Systems: speculation on several executors, and published systems that are no decoders of their own."""

from hasten.methods.systems import easyspec, listed, mirror

__all__ = ["easyspec", "listed", "mirror"]
