"""One file per peer. Each runs in its peer's own environment, without hasten, and knows only `protocol`.

A worker's module has `load(settings) -> Worker`, and `convert(source, target, precision)` if its peer does not read
Hugging Face folders.
"""
