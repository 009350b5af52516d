"""transformers' `generate` with a static cache and a compiled decoding step."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig, StaticCache

from workers.protocol import Settings, Worker
from workers.transformers import Transformers


class Compiled(Transformers):
    """One cache per batch size, so that a size is compiled once; prompts are read eagerly."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.context = settings.context
        self.caches: dict[int, StaticCache] = {}
        self.compile = CompileConfig(fullgraph=False, mode="default", dynamic=False)
        # generate compiles by itself on accelerators only, unless it is told so.
        self.compile._compile_all_devices = True

    def options(self, prompts: list[list[int]], speculation: str | None) -> dict[str, Any]:
        size = len(prompts)
        if size not in self.caches:
            self.caches[size] = StaticCache(self.model.config, max_cache_len=self.context)
        self.caches[size].reset()
        return {"past_key_values": self.caches[size], "compile_config": self.compile}


def load(settings: Settings) -> Worker:
    return Compiled(settings)
