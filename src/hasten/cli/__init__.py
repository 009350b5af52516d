"""The command line: one file per command, all of them thin."""

from hasten.cli.app import main

__all__ = ["main"]
