"""transformers' `generate` with a static cache and a compiled decoding step."""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig, StaticCache

from workers.protocol import Settings, Worker
from workers.transformers import Transformers


class Compiled(Transformers):
    """A cache per batch size and length, so that each is compiled once; prompts are read eagerly."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.caches: dict[tuple[int, int], StaticCache] = {}
        self.compile = CompileConfig(fullgraph=False, mode="default", dynamic=False)
        # generate compiles by itself on accelerators only, unless it is told so.
        self.compile._compile_all_devices = True

    def options(self, prompts: list[list[int]], speculation: str | None) -> dict[str, Any]:
        # The tokens that are to come fit behind any prompt that leaves the context room.
        size = len(prompts), self.settings.room(prompts, 1)
        if size not in self.caches:
            self.caches[size] = StaticCache(self.model.config, max_cache_len=size[1])
        self.caches[size].reset()
        return {"past_key_values": self.caches[size], "compile_config": self.compile}


def load(settings: Settings) -> Worker:
    return Compiled(settings)
