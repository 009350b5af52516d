"""The server: HTTP on one side, the engine on a thread of its own on the other."""
