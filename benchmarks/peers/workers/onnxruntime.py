"""ONNX Runtime GenAI: static batches padded on the right, no speculation."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

from workers.protocol import Answer, Clock, Settings, Worker

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


class OnnxRuntime(Worker):
    """A model and the loop over its generator."""

    def __init__(self, settings: Settings) -> None:
        config = genai.Config(settings.model)
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": settings.threads}}}}
        config.overlay(json.dumps(options))
        self.model = genai.Model(config)
        self.pad = json.loads((Path(settings.model) / "genai_config.json").read_text())["model"]["pad_token_id"]

    def begin(self, speculation: str | None) -> None:
        """Nothing is learned from prompts."""

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        width = max(map(len, prompts))
        ids = np.array([prompt + [self.pad] * (width - len(prompt)) for prompt in prompts], dtype=np.int32)
        params = genai.GeneratorParams(self.model)
        params.set_search_options(batch_size=len(prompts), max_length=width + max_tokens, do_sample=False)
        clock = Clock()
        generator = genai.Generator(self.model, params)
        generator.append_tokens(ids)
        generator.generate_next_token()
        prefill = clock()
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        tokens = [generator.get_sequence(row)[width:].tolist() for row in range(len(prompts))]
        return Answer(tokens, clock(), prefill)

    def logits(self, prompt: list[int]) -> np.ndarray:
        params = genai.GeneratorParams(self.model)
        params.set_search_options(batch_size=1, max_length=len(prompt) + 1, do_sample=False)
        generator = genai.Generator(self.model, params)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        return generator.get_output("logits")[0]


def convert(source: Path, target: Path, precision: str) -> None:
    """Build the model; without its end of text, so that generation goes on beyond it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
        command += ["-p", PRECISIONS[precision], "-e", "cpu", "-c", scratch]
        status = subprocess.run(command).returncode
        if status:
            raise RuntimeError(f"the builder ends with status {status}")
    file = target / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["eos_token_id"] = []
    file.write_text(json.dumps(config, indent=2))


def load(settings: Settings) -> Worker:
    return OnnxRuntime(settings)
