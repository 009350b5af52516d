"""Chimera's encoders and heads, trained on a target's own answers and states (2402.15758)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.methods.heads.chimera_weights import TRIGRAM, ChimeraWeights, LayerWeights
from hasten.methods.heads.pieces import rounded
from hasten.model import Decoder
from hasten.model.config import Slots
from hasten.model.layers import Rotary
from hasten.model.weights import Piece
from hasten.train.heads.recipe import Dialogues, HeadBatch
from hasten.train.heads.speakers import SpeakerRecipe, Speakers, silent


class Trigrams(nn.Module):
    """g [rows, hidden] of three embeddings side by side.

    Args:
        width: channels that each of the three is narrowed to; no fewer than it has leaves them as they are.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(hidden, width, bias=False) if width < hidden else None
        width = TRIGRAM * min(width, hidden)
        # As the authors begin: what is mixed in comes with training.
        self.mix, self.out = silent(width, width), nn.Linear(width, hidden, bias=False)

    def forward(self, parts: Tensor) -> Tensor:
        """From embeddings [rows, 3, hidden]."""
        side = (parts if self.narrow is None else self.narrow(parts)).flatten(1)
        made: Tensor = self.out(side + F.silu(self.mix(side)))
        return made.float()


class FullContext(nn.Module):
    """One layer with heads as the target's."""

    def __init__(self, target: Decoder, ffn: int) -> None:
        super().__init__()
        config, shape = target.config, target.config.layers[0]
        self.width, own, shared = (
            shape.slots.key_width, shape.heads * shape.slots.key_width, shape.slots.heads * shape.slots.key_width
        )  # fmt: skip
        hidden, self.kv_heads = config.hidden_size, shape.slots.heads
        self.rotary = Rotary(torch.tensor(config.inverse_frequencies), config.rope_factor, config.rope_axes)
        self.mixer_norm, self.mlp_norm = (nn.RMSNorm(hidden, config.norm_eps) for _ in range(2))
        self.queries, self.attention_out = nn.Linear(hidden, own, bias=False), nn.Linear(own, hidden, bias=False)
        self.keys, self.values = (nn.Linear(hidden, shared, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)

    def slots(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, width]."""
        normed = self.mixer_norm(rows)
        return self._turned(self.keys(normed), positions), torch.unflatten(self.values(normed), 1, (-1, self.width))

    def ask(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Queries [rows, kv_heads, group, width]."""
        queries = self._turned(self.queries(self.mixer_norm(rows)), positions)
        return torch.unflatten(queries, 1, (self.kv_heads, -1))

    def finish(self, rows: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream behind the layer, from what attention made of the rows, [rows, heads * width]."""
        rows = rows + self.attention_out(mixed).float()
        normed = self.mlp_norm(rows)
        fed: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return rows + fed.float()

    def _turned(self, rows: Tensor, positions: Tensor) -> Tensor:
        heads = torch.unflatten(rows, 1, (-1, self.width))
        return self.rotary.rotate(heads, self.rotary.angles(positions, heads.dtype))

    def exported(self, store: str) -> LayerWeights:
        """As it is stored."""
        norms = {name: Piece(getattr(self, name).weight.detach().bfloat16()) for name in ("mixer_norm", "mlp_norm")}
        linears = ("queries", "keys", "values", "attention_out", "gate", "up", "down")
        return LayerWeights(**norms, **{name: rounded(getattr(self, name).weight, store) for name in linears})


class ChimeraNetwork(Speakers):
    """Both encoders, and what the target's state adds at each level.

    A node of a tree is looked at where the path above it was right. So drafts go along the text that came, with the
    network's own estimates in the place of states, which no gradient goes back through.

    Args:
        width: see `Trigrams`.
        ffn: channels of the layer's MLP.
    """

    embedding: Tensor

    def __init__(self, target: Decoder, words: Tensor | None, levels: int, width: int, ffn: int) -> None:
        super().__init__(target, words, levels, shared=True, bias=False)
        hidden = target.config.hidden_size
        self.register_buffer("embedding", target.embedding.float(), persistent=False)
        self.trigrams, self.layer = Trigrams(hidden, width), FullContext(target, ffn)
        self.each = [nn.Linear(hidden, hidden, bias=False) for _ in range(levels)]
        self.modules_of_each = nn.ModuleList(self.each)
        for added in self.each:
            # So that a level begins as the target's own head, on the estimate.
            nn.init.zeros_(added.weight)

    def context(self, batch: HeadBatch) -> Tensor:
        """Estimates [rows, levels, hidden]: of drafts that begin behind each row, the state at each level."""
        lengths = torch.bincount(batch.dialogue).tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
        grams = self.grams(batch, positions)
        states, own = (torch.stack(self.layer.slots(rows, positions), 1) for rows in (batch.states[:, 0], grams))
        starts = batch.ahead(2)
        made = torch.zeros(len(positions), self.count, grams.shape[1])
        above: list[Tensor] = []
        for level in range(self.count):
            kept = torch.isin(starts, batch.ahead(level + 2))
            starts, above = starts[kept], [slots[kept] for slots in above]
            if not len(starts):
                break
            at = starts + level + 1
            queries = self.layer.ask(grams[at], positions[at])
            mixed = [
                _attend(
                    queries[some],
                    states[text],
                    own[text],
                    starts[some] - text.start,
                    level,
                    [slots[some] for slots in above],
                )
                for text, some in _texts(lengths, batch.dialogue[starts])
            ]
            estimates = self.layer.finish(grams[at], torch.cat(mixed))
            made = made.index_put((starts, torch.tensor(level)), estimates)
            above.append(torch.stack(self.layer.slots(estimates.detach(), positions[at]), 1))
        return made

    def hidden(self, k: int, context: Tensor, batch: HeadBatch, rows: Tensor) -> Tensor:
        added: Tensor = self.each[k](batch.states[rows, 0])
        return context[rows, k] + added

    def grams(self, batch: HeadBatch, positions: Tensor) -> Tensor:
        """g [rows, hidden]. That of a text's first token is nobody's: there is none before it."""
        rows = torch.arange(len(batch.ids))
        # The second token of a text counts twice, and stands behind the first.
        second = torch.where(positions > 1, rows - 1, rows)
        first = torch.where(positions > 1, rows - 2, rows - positions)
        tokens = batch.ids[torch.stack([first, second, rows], 1)]
        made: Tensor = self.trigrams(F.embedding(tokens, self.embedding))
        return made


def _texts(lengths: list[int], of: Tensor) -> list[tuple[slice, slice]]:
    """Of each text that has starts, its rows and its starts.

    Args:
        of: int64 [starts], ascending: the number of each one's text.
    """
    counts = torch.bincount(of, minlength=len(lengths)).tolist()
    bounds = (pairwise([0, *accumulate(each)]) for each in (lengths, counts))
    texts = [(slice(*text), slice(*own)) for text, own in zip(*bounds, strict=True)]
    return [(text, own) for text, own in texts if own.stop > own.start]


def _attend(queries: Tensor, states: Tensor, grams: Tensor, starts: Tensor, level: int, above: list[Tensor]) -> Tensor:
    """[starts, heads * width]: of one text, what each start's g at a level sees.

    Args:
        queries: [starts, kv_heads, group, width].
        states, grams: keys and values [rows, 2, kv_heads, width].
        starts: rows of the text.
        above: the same of each start's estimates, [starts, 2, kv_heads, width].
    """
    scale, row = queries.shape[-1] ** -0.5, torch.arange(len(states))
    keys, values = torch.cat([states, grams[1:]]).unbind(1)
    sees = torch.cat([row <= starts[:, None], row[1:] <= starts[:, None] + level + 1], 1)
    scores = torch.einsum("skgw,nkw->skgn", queries, keys) * scale
    scores = scores.masked_fill(~sees[:, None, None], -torch.inf)
    if not above:
        return torch.einsum("skgn,nkw->skgw", scores.softmax(-1), values).flatten(1)
    own_keys, own_values = torch.stack(above, 1).unbind(2)
    own = torch.einsum("skgw,snkw->skgn", queries, own_keys) * scale
    shares = torch.cat([scores, own], -1).softmax(-1)
    mixed = torch.einsum("skgn,nkw->skgw", shares[..., : len(keys)], values)
    return (mixed + torch.einsum("skgn,snkw->skgw", shares[..., len(keys) :], own_values)).flatten(1)


@dataclass(frozen=True)
class ChimeraRecipe(SpeakerRecipe[ChimeraNetwork]):
    """Attributes beside those of `SpeakerRecipe`, of which `layers` and `shared_head` are as they are:

    width: channels of each token's share of a trigram.
    ffn: of the layer's MLP.
    """

    width: int = 288
    ffn: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.ffn < 16 or self.ffn % 16:
            raise UserError("chimera: width must be positive, and ffn a multiple of 16")

    def build(self, target: Decoder, dialogues: Dialogues) -> ChimeraNetwork:
        if not isinstance(target.config.layers[0].keeps, Slots):
            raise UserError("chimera has a layer of attention as the target's, and this model's first is another kind")
        words = dialogues.words(self.words, target.config.vocab_size)
        return ChimeraNetwork(target, words, self.heads, self.width, self.ffn)

    def export(self, model: ChimeraNetwork, folder: Path) -> None:
        trigrams = model.trigrams
        (said,) = model.exported(self.store)
        weights = ChimeraWeights(
            rounded(trigrams.mix.weight, self.store, trigrams.mix.bias),
            rounded(trigrams.out.weight, self.store),
            model.layer.exported(self.store),
            [rounded(added.weight, self.store) for added in model.each],
            None if trigrams.narrow is None else rounded(trigrams.narrow.weight, self.store),
            said,
            model.words,
            self.measured(model),
        )
        weights.save(folder, self.told(model))
