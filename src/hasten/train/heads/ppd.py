"""PPD: a few vectors, trained to ask the frozen target for the tokens behind the next one (2405.18628, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.drafters.vocabtrim import most_frequent
from hasten.methods.heads.ppd import PromptTokens, soft_rows
from hasten.train.heads.frozen import Frozen, Inserted
from hasten.train.heads.inserted import InsertedRecipe, TextBatch, Texts, standing


class PromptNetwork(nn.Module):
    """Vectors [prompts, ensemble, hidden], beside the target that they are for.

    Args:
        begin: what they begin as.
    """

    def __init__(self, target: Frozen, begin: Tensor) -> None:
        super().__init__()
        self.target, self.vectors = target, nn.Parameter(begin)


@dataclass(frozen=True)
class PPDRecipe(InsertedRecipe[PromptNetwork]):
    """Attributes beside those of all:

    ensemble: vectors of each prompt token.
    """

    lr: float = 0.01
    warmup: float = 0.0
    ensemble: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ensemble <= 64:
            raise UserError("ppd: ensemble must be between 1 and 64")

    def build(self, target: Frozen, texts: Texts) -> PromptNetwork:
        """They begin as the vectors of ordinary tokens: those that answers say most often."""
        said = Counter(token for each in texts.trained for token in each.answer)
        vocabulary, hidden = target.model.embedding.shape
        words = most_frequent(said, self.prompts * self.ensemble, vocabulary)
        vectors = target.model.embedding[torch.tensor(words)].float().view(self.prompts, self.ensemble, hidden)
        return PromptNetwork(target, vectors.clone())

    def target(self, model: PromptNetwork) -> Frozen:
        return model.target

    def insert(self, model: PromptNetwork, batch: TextBatch, places: Sequence[Sequence[int]]) -> Inserted:
        soft = soft_rows(model.vectors, self.prompts)
        groups = sum(map(len, places))
        return Inserted(0, lambda states: soft.states.repeat(groups, 1), *standing(batch.lengths, places, soft))

    def export(self, model: PromptNetwork, folder: Path) -> None:
        table = self.accuracy(model, Texts(Path(self.data)))
        tokens = PromptTokens(model.vectors.detach(), accuracy=tuple(map(tuple, table)))
        tokens.save(folder, {"hidden_size": model.vectors.shape[2], "target": Path(self.parent).name})
