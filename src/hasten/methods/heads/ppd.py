"""PPD: trained prompt tokens behind every node of a tree let the frozen target draft for itself.

"Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference", 2024, arXiv 2405.18628.
Prompt token j stands where the j-th unknown token will, and the target's own head says of its state what comes after
that. Prompts see those before them, so that later guesses know of earlier ones. Nothing is added to the target but a
few vectors; `hasten train ppd` makes them. Exactness: lossless, greedy and sampling: nothing sees a prompt, and none is
kept; `acceptance=typical` is the lossy rule that the paper measures with.

Decisions where the paper leaves room, or where its code does something else:

- *Tree.* The paper prunes a tree offline for each number of prompts. Here rows are allotted at every step, by what its
  guesses promise (`allotment.py`) and by what rows cost on this machine.
- *Ensembles* (several vectors per prompt token, which stand in one place, each seeing its own kind before it) work in
  decoding, too, where the authors' code has them in training and evaluation only.
- *Heads* run on the prompts of the node that was accepted last, not on all rows.
- *No prompts behind the text that is read*: the first step after it drafts, and gives one token.

Format: the authors' (`adapter_config.json`, `prompt_embeddings`), and `config.json` with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hasten.documents import dumps
from hasten.engine import SoftRows, Target, register
from hasten.errors import UserError
from hasten.files import write_text
from hasten.methods.heads.files import (
    CONFIG,
    read_accuracy,
    read_config,
    read_tensors,
    require_names,
    require_shape,
    save,
)
from hasten.methods.heads.head import own_head, require_decoder
from hasten.methods.heads.probing import ProbeDrafter, ProbingParameters
from hasten.model.checkpoint import read_json

ADAPTER, VECTORS = "adapter_config.json", "prompt_embeddings"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
SIGHTS = ("ensemble", "decoder", "encoder")
"""Which vectors see which (`vt_attention_type`): their own kind in prompts before them; all before; their prompt's."""
PLAIN = {"aggregation_type": "mean", "num_exits": 1, "use_custom_lm_head": False, "use_prefix_tuning": False}
"""Of an adapter, what there is here; the authors' code has more, their published ones do not."""


def soft_rows(vectors: Tensor, prompts: int, sight: str = "ensemble") -> SoftRows:
    """The rows of some prompt tokens, one token's behind the other's.

    Args:
        vectors: [prompts, vectors of each, hidden].
        sight: one of SIGHTS.
    """
    each = vectors.shape[1]
    prompt, kind = torch.arange(prompts * each) // each, torch.arange(prompts * each) % each
    same, before = prompt[:, None] == prompt, torch.arange(len(prompt))[:, None] >= torch.arange(len(prompt))
    sees = {"ensemble": before & (kind[:, None] == kind), "decoder": before, "encoder": same}[sight]
    return SoftRows(vectors[:prompts].flatten(0, 1), tuple((prompt + 1).tolist()), sees)


@dataclass(frozen=True)
class PromptTokens:
    """What was trained.

    Attributes:
        vectors: float32 [prompts, vectors of each, hidden].
        sight: which of them see which, one of SIGHTS.
        accuracy: per prompt, how often each rank was right on held-out text; empty where nobody measured it.
    """

    vectors: Tensor
    sight: str = "ensemble"
    accuracy: tuple[tuple[float, ...], ...] = field(default=())

    @classmethod
    def load(cls, folder: Path, hidden: int) -> Self:
        """Read a folder.

        Args:
            hidden: the target's width.

        Raises:
            UserError: no prompt tokens, damaged ones, some for another target, or of a kind that is unknown here.
        """
        file = next((folder / name for name in FILES if (folder / name).exists()), None)
        if file is None or not (folder / ADAPTER).exists():
            raise UserError(f"ppd: there is no adapter in {folder}: `hasten train ppd --model MODEL` makes one")
        config = read_json(folder / ADAPTER)
        prompts, each = (config.get(name) for name in ("num_special_tokens", "virtual_tokens_per_special_token"))
        if type(prompts) is not int or type(each) is not int or not (1 <= prompts <= 64 and 1 <= each <= 64):
            raise UserError(f"{folder / ADAPTER} must say num_special_tokens and virtual_tokens_per_special_token")
        for name, plain in PLAIN.items():
            if config.get(name, plain) != plain:
                raise UserError(f"{folder / ADAPTER}: {name} {config[name]!r} is not known here")
        sight = config.get("vt_attention_type", "decoder")
        if sight not in SIGHTS:
            raise UserError(f"{folder / ADAPTER}: vt_attention_type must be {', '.join(SIGHTS)}, not {sight!r}")
        tensors = read_tensors(file)
        require_names(file, tensors, {VECTORS})
        require_shape(file, VECTORS, tensors[VECTORS], prompts * each, hidden)
        vectors = tensors[VECTORS].float().view(prompts, each, hidden)
        return cls(vectors, sight, read_accuracy(folder / CONFIG, read_config(folder), prompts))

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write the authors' format, and `config.json`.

        Args:
            config: what else that one says.

        Raises:
            UserError: they cannot be written.
        """
        prompts, each, _ = self.vectors.shape
        accuracy = [list(ranks) for ranks in self.accuracy]
        tensors = {VECTORS: self.vectors.flatten(0, 1)}
        save(folder, {"model_type": "ppd", "accuracy": accuracy, **config}, tensors, FILES[0])
        adapter = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_special_tokens": prompts,
            "virtual_tokens_per_special_token": each,
            "num_virtual_tokens": prompts * each,
            "vt_attention_type": self.sight,
            **PLAIN,
        }
        write_text(folder / ADAPTER, dumps(adapter, indent=2) + "\n")


@register(
    "ppd",
    family="heads",
    exactness="lossless",
    paper="2405.18628",
    title="PPD: prompt tokens behind every node draft the next",
    parameters=ProbingParameters,
    needs_training=True,
    command="hasten train ppd --model MODEL",
    defaults=own_head("ppd"),
)
class PPD(ProbeDrafter):
    """See `ProbeDrafter`; its rows are prompt tokens.

    Raises:
        UserError: no prompt tokens, or some for another target.
    """

    def __init__(self, target: Target, parameters: ProbingParameters) -> None:
        hidden = require_decoder(target, "ppd").config.hidden_size
        if not parameters.head:
            raise UserError("ppd needs prompt tokens for this model: `hasten train ppd --model MODEL` makes them")
        tokens = PromptTokens.load(Path(parameters.head), hidden)
        forms = [soft_rows(tokens.vectors, count, tokens.sight) for count in range(1, len(tokens.vectors) + 1)]
        super().__init__(target, "ppd", parameters, forms, tokens.accuracy)
