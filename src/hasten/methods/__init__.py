"""The methods that come with hasten; importing this package registers them."""

from hasten.methods import drafters

__all__ = ["drafters"]
