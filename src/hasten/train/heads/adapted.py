"""A target that learns a little: beside each of its matrices stand two thin ones, whose product is added.

"LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685, section 4. What was there stays as it is.
Norms, the table of tokens and the head are left alone, so that a head which is the table goes on being it. In the end
the products are added to the matrices, and the target is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from shutil import copyfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.files import replacing, writing
from hasten.model import Decoder, ModelConfig
from hasten.model.architectures.base import TENSORS, stored_names
from hasten.model.checkpoint import INDEX, SINGLE, Tensors, weight_file, weight_map
from hasten.model.linear import Linear
from hasten.train.heads.frozen import attend, causal, fed, plain, projected

BESIDE = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "*.jinja", INDEX,
)  # fmt: skip
"""What a checkpoint's folder has beside its weights."""


class LowRank(nn.Module):
    """A matrix of one or more parts, one below the other, with two thin matrices beside each part.

    Args:
        base: stays as it is.
        parts: outputs of each.
        rank: of each part's product, which begins as zero.
        scale: of the products.
    """

    def __init__(self, base: Linear, parts: Sequence[int], rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.rank, self.scale = base, rank, scale
        self.in_features, self.out_features = base.in_features, base.out_features
        bound = self.in_features**-0.5
        self.thin = nn.Parameter(torch.empty(len(parts) * rank, self.in_features).uniform_(-bound, bound))
        self.wide = nn.ParameterList(torch.zeros(outputs, rank) for outputs in parts)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features], float32."""
        narrow = torch.split(F.linear(rows, self.thin), self.rank, -1)
        added = torch.cat([F.linear(each, wide) for each, wide in zip(narrow, self.wide, strict=True)], -1)
        return (self.base.forward(rows) + self.scale * added).float()

    def forward_add(self, rows: Tensor, residual: Tensor) -> Tensor:
        """See `Linear`."""
        return residual + self.forward(rows)

    def added(self) -> list[Tensor]:
        """Of each part what it has more than the base, [outputs, in_features]."""
        thin = torch.split(self.thin.detach(), self.rank)
        return [self.scale * wide.detach() @ each for wide, each in zip(self.wide, thin, strict=True)]

    def dequant(self) -> Tensor:
        """See `Linear`."""
        return self.base.dequant() + torch.cat(self.added())

    def nbytes(self) -> int:
        """See `Linear`."""
        return self.base.nbytes() + sum(parameter.nbytes for parameter in self.parameters())


class Adapted(nn.Module):
    """The layers of a target whose mixers are attention, as they learn.

    Args:
        model: the target; its layers are taken.
        rank: of the products.
        scale: of the products.

    Raises:
        UserError: layers of another kind.
    """

    def __init__(self, model: Decoder, rank: int, scale: float) -> None:
        super().__init__()
        self.layers = [plain(layer) for layer in model.layers]
        self.embedding, self.norm = model.embedding, model.norm
        self.parts: dict[str, tuple[LowRank, int]] = {}
        for index, (_, attention, mlp) in enumerate(self.layers):
            shape = attention.config
            kept = shape.slots.heads * shape.slots.key_width

            def adapted(base: Linear, layer: int = index, **parts: int) -> LowRank:
                beside = LowRank(base, tuple(parts.values()), rank, scale)
                names = [f"{TENSORS[part].format(layer)}.weight" for part in parts]
                self.parts |= {name: (beside, number) for number, name in enumerate(names)}
                return beside

            attention.qkv = adapted(attention.qkv, query=attention.out.in_features, key=kept, value=kept)
            attention.out = adapted(attention.out, attention_out=attention.out.out_features)
            mlp.gate_up = adapted(mlp.gate_up, gate=mlp.down.in_features, up=mlp.down.in_features)
            mlp.down = adapted(mlp.down, down=mlp.down.out_features)
        self.adapters = nn.ModuleList(dict.fromkeys(beside for beside, _ in self.parts.values()))

    def forward(self, ids: Tensor, bounds: Sequence[int]) -> Tensor:
        """What the head reads of texts that stand one behind the other, float32 [rows, hidden].

        Args:
            ids: int64 [rows].
            bounds: [texts + 1], where each text begins, and where the last one ends.
        """
        texts = [slice(*each) for each in pairwise(bounds)]
        positions = torch.cat([torch.arange(text.stop - text.start) for text in texts])
        x = F.embedding(ids, self.embedding)
        for layer, attention, mlp in self.layers:
            q, k, v = projected(layer, attention, x, positions)
            window = attention.config.window
            mixed = [attend(q[text], k[text], v[text], causal(text, window)) for text in texts]
            x = fed(layer, attention, mlp, x, torch.cat(mixed))
        return self.norm.forward(x)

    def added(self) -> dict[str, Tensor]:
        """What was learnt, by a Llama's names of the matrices to which it is to be added."""
        products = {beside: beside.added() for beside, _ in self.parts.values()}
        return {name: products[beside][number] for name, (beside, number) in self.parts.items()}


def write_adapted(parent: Path, folder: Path, config: ModelConfig, added: Mapping[str, Tensor]) -> None:
    """A checkpoint like its parent, some of whose matrices have more.

    Args:
        parent, folder: of the one that is there, and of the new one.
        config: of both.
        added: by a Llama's names.

    Raises:
        UserError: the parent does not have these matrices, or the new one cannot be written.
    """
    stored = Tensors(parent, torch.float32, torch.device("cpu"))
    called = stored_names(TENSORS, config, stored)
    prefixed = called["norm"] == TENSORS["norm"]
    more = {name if prefixed else name.removeprefix("model."): matrix for name, matrix in added.items()}
    for name, matrix in more.items():
        stored.require(name, *matrix.shape)
    where = weight_map(parent)
    for file in {SINGLE} if where is None else set(where.values()):
        tensors = load_file(weight_file(parent, file))
        for name in tensors.keys() & more.keys():
            tensors[name] = (tensors[name].float() + more[name]).to(tensors[name].dtype)
        with replacing(folder / file) as fresh:
            save_file(tensors, fresh, {"format": "pt"})
    for pattern in BESIDE:
        for file_beside in parent.glob(pattern):
            with writing(folder / file_beside.name):
                copyfile(file_beside, folder / file_beside.name)
