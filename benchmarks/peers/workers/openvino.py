"""OpenVINO GenAI: continuous batching, prompt lookup, draft models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from workers.protocol import Answer, Clock, Settings, Worker

WEIGHTS = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8", "int4": "int4"}


class OpenVINO(Worker):
    """A pipeline per kind of speculation, made when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pipelines: dict[str | None, Any] = {}
        self.request: Any = None

    def begin(self, speculation: str | None) -> None:
        if speculation in self.pipelines:
            return
        settings = self.settings
        properties: dict[str, Any] = _properties(settings)
        if speculation == "prompt-lookup":
            properties["prompt_lookup"] = True
        if speculation == "draft-model":
            properties["draft_model"] = genai.draft_model(settings.draft, "CPU", **_properties(settings))
        self.pipelines[speculation] = genai.ContinuousBatchingPipeline(
            settings.model, _scheduler(settings), "CPU", properties, {}, {}
        )

    def run(self, prompts: list[list[int]], max_tokens: int, speculation: str | None) -> Answer:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        if speculation:
            config.num_assistant_tokens = 5
        if speculation == "prompt-lookup":
            config.max_ngram_size = 3
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        clock = Clock()
        results = self.pipelines[speculation].generate(ids, [config] * len(ids))
        tokens = [list(result.m_generation_ids[0]) for result in results]
        return Answer(tokens, clock())

    def logits(self, prompt: list[int]) -> np.ndarray:
        """By the model alone: the pipeline tells what it chose, not what it thought."""
        if self.request is None:
            model = openvino.Core().compile_model(
                str(Path(self.settings.model) / "openvino_model.xml"), "CPU", _properties(self.settings)
            )
            self.request = model.create_infer_request()
        self.request.reset_state()
        ids, ones = np.array([prompt], dtype=np.int64), np.ones((1, len(prompt)), dtype=np.int64)
        inputs = {"input_ids": ids, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1}
        return self.request.infer(inputs | {"beam_idx": np.zeros(1, dtype=np.int32)})["logits"][0]


def _properties(settings: Settings) -> dict[str, Any]:
    """Precisions are said aloud: left alone, OpenVINO computes in bfloat16 and keeps an eight-bit cache."""
    exact = settings.precision == "float32"
    return {
        "INFERENCE_NUM_THREADS": settings.threads,
        "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
        "KV_CACHE_PRECISION": "f32" if exact else "bf16",
    }


def _scheduler(settings: Settings) -> Any:
    """Room for the whole batch; no prefix cache, which would remember the prompts of the round before."""
    config = genai.SchedulerConfig()
    config.max_num_seqs = settings.batch
    config.cache_size = 2
    config.enable_prefix_caching = False
    return config


def convert(source: Path, target: Path, precision: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _older(source, Path(folder) / "checkpoint")
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
        command += ["--task", "text-generation-with-past", "--weight-format", WEIGHTS[precision], str(target)]
        if precision == "int4":
            # A width that the usual group does not divide gets a smaller group.
            command += ["--group-size-fallback", "adjust"]
        status = subprocess.run(command).returncode
        if status:
            raise RuntimeError(f"optimum-cli ends with status {status}")


def _older(source: Path, target: Path) -> Path:
    """The checkpoint with the tokenizer class that transformers before 5.6 knows."""
    shutil.copytree(source, target)
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
    return target


def load(settings: Settings) -> Worker:
    return OpenVINO(settings)
