"""EAGLE's layer as it is trained: over whole dialogues, and on its own outputs as far ahead as it will draft.

A row is a state and the token behind it. Where a head drafts on, the row of its step i has the state that it made
itself in step i - 1, the token that came, and sees what the target's states made of the text up to where it began, and
its own rows of the steps in between: one key per step (EAGLE-3, 2503.01840, section 3.2, "training-time test"). So a
step costs as many keys more as there were steps, not a text more.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.model import Decoder
from hasten.model.layers import Attention, GatedMLP
from hasten.train.heads.recipe import HeadBatch

SMALL = 0.02
"""Of weights that begin with noise."""


class EagleLayer(nn.Module):
    """The trained part.

    That of EAGLE-3 begins as the target's last layer, on the last of a row's states. That of EAGLE-1, which reads final
    states and has no norm in front of them, begins at random, as a layer that adds nothing: the target's weights make
    of such states what takes long to be forgotten.

    Args:
        target: the network.
        version: 1 or 3.
        taps: states that a row of EAGLE-3 is made of.
    """

    def __init__(self, target: Decoder, version: int, taps: int) -> None:
        super().__init__()
        config, last = target.config, target.layers[-1]
        self.config, self.version = config, version
        self.shape, self.hidden = config.layers[-1], config.hidden_size
        mixer, mlp = last.mixer, last.mlp
        assert isinstance(mixer, Attention) and isinstance(mlp, GatedMLP)
        gate, up = mlp.gate_up.dequant().chunk(2)
        kept = self.shape.slots.heads * self.shape.slots.key_width
        qkv = mixer.qkv.dequant()
        query, key, value = torch.split(qkv, [len(qkv) - 2 * kept, kept, kept])
        begin = {"query": query, "key": key, "value": value, "attention_out": mixer.out.dequant()}
        begin |= {"gate": gate, "up": up, "down": mlp.down.dequant(), "mlp_norm": last.mlp_norm.weight}
        if version == 1:
            begin |= {"fusion": torch.empty(self.hidden, 2 * self.hidden), "mlp_norm": torch.ones(self.hidden)}
            silent = {name: torch.zeros_like(begin[name]) for name in ("attention_out", "down")}
            matrices = {name: each for name, each in begin.items() if each.ndim == 2}
            begin |= {name: torch.randn(each.shape) / each.shape[1] ** 0.5 for name, each in matrices.items()} | silent
        else:
            others = torch.randn(self.hidden, self.hidden * (taps - 1))
            begin |= {"fusion": torch.cat([SMALL * others, torch.eye(self.hidden)], 1)}
            for name in ("query", "key", "value"):
                begin[name] = torch.cat([SMALL * torch.randn(begin[name].shape), begin[name]], 1)
            begin |= {"token_norm": torch.ones(self.hidden), "mixer_norm": last.mixer_norm.weight}
            begin |= {"norm": target.norm.weight}
        self.weights = nn.ParameterDict({name: nn.Parameter(each.float().clone()) for name, each in begin.items()})
        self.frequencies = torch.tensor(config.inverse_frequencies)
        self.embedding = target.embedding.float()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (self.hidden,), self.weights[name], self.config.norm_eps)

    def enter(self, states: Tensor, tokens: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """The residual stream [rows, hidden] that rows begin with, and what attention reads of them.

        Args:
            states: the target's, [rows, taps * hidden], or its own outputs, [rows, hidden].
            tokens: int64 [rows], behind them.
            own: which of the two.
        """
        told = self.embedding[tokens]
        if self.version == 1:
            x = F.linear(torch.cat([told, states], -1), self.weights["fusion"]).float()
            return x, x
        x = states if own else F.linear(states, self.weights["fusion"]).float()
        return x, torch.cat([self.norm(told, "token_norm"), self.norm(x, "mixer_norm")], -1)

    def heads(self, read: Tensor, name: str, places: Tensor) -> Tensor:
        """Queries, keys or values [rows, heads, width] of what attention reads; turned, unless they are values."""
        width = self.shape.slots.key_width
        made = F.linear(read, self.weights[name]).float().view(len(read), -1, width)
        if name == "value":
            return made
        angle = (places[:, None] * self.frequencies)[:, None]
        cosine, sine = angle.cos() * self.config.rope_factor, angle.sin() * self.config.rope_factor
        one, other = made.chunk(2, -1)
        return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output [rows, hidden] behind attention's [rows, heads, width]."""
        x = x + F.linear(mixed.flatten(1), self.weights["attention_out"]).float()
        normed = self.norm(x, "mlp_norm")
        inner = F.silu(F.linear(normed, self.weights["gate"])) * F.linear(normed, self.weights["up"])
        return x + F.linear(inner, self.weights["down"]).float()

    def roll(self, states: Tensor, batch: HeadBatch, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Step by step, where the head drafts the token i + 2 places on, and its outputs there.

        Args:
            states: the target's, [rows, taps * hidden] of the batch.
            batch: whole dialogues.

        Returns:
            Of each step i int64 [n], rows of the batch, which are among those of the step before, and [n, hidden].
        """
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), batch.dialogue.diff().nonzero().flatten() + 1])
        places = torch.arange(len(batch.ids)) - starts[batch.dialogue]
        # The last token of a dialogue stands behind a row, but has no row of its own.
        tokens = torch.cat([batch.ids[1:], batch.ids[:1]])
        entering, read = self.enter(states, tokens, own=False)
        keys, values = self.heads(read, "key", places), self.heads(read, "value", places)
        rows = torch.arange(len(batch.ids))
        own: list[tuple[Tensor, Tensor]] = []
        outputs = entering
        for step in range(steps):
            fewer = batch.ahead(step + 2)
            if not len(fewer):
                return
            kept = torch.searchsorted(rows, fewer)
            rows, outputs = fewer, outputs[kept]
            own = [(key[kept], value[kept]) for key, value in own]
            if step:
                entering, read = self.enter(outputs, batch.ids[rows + step + 1], own=True)
                turned = places[rows] + step
                own.append((self.heads(read, "key", turned), self.heads(read, "value", turned)))
            else:
                entering, read = entering[rows], read[rows]
            queries = self.heads(read, "query", places[rows] + step)
            with torch.autocast("cpu", enabled=False):
                mixed = attend(queries, keys, values, own, rows, starts)
            outputs = self.finish(entering, mixed)
            yield rows, outputs


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, own: list[tuple[Tensor, Tensor]], rows: Tensor, starts: Tensor
) -> Tensor:
    """Each query over its dialogue's keys up to its own row, and over one key of each step in between.

    Args:
        queries: [n, heads, width], of these `rows` (int64 [n], ascending).
        keys, values: [all rows, kv_heads, width].
        own: per step in between, keys and values [n, kv_heads, width].
        starts: int64, the first row of each dialogue.

    Returns:
        [n, heads, width].
    """
    bounds = [*starts.tolist(), len(keys)]
    cuts = torch.searchsorted(rows, torch.tensor(bounds)).tolist()
    group, scale = queries.shape[1] // keys.shape[1], queries.shape[2] ** -0.5
    outs = []
    for (start, stop), (first, last) in zip(pairwise(bounds), pairwise(cuts), strict=True):
        if first == last:
            continue
        asked = (queries[first:last] * scale).transpose(0, 1)
        seen, told = (each[start:stop].repeat_interleave(group, 1).transpose(0, 1) for each in (keys, values))
        unseen = torch.arange(start, stop) > rows[first:last, None]
        scores = [(asked @ seen.transpose(1, 2)).masked_fill(unseen, -torch.inf)]
        mine = [[each[first:last].repeat_interleave(group, 1).transpose(0, 1) for each in pair] for pair in own]
        scores += [(asked * key).sum(-1, keepdim=True) for key, _ in mine]
        shares = torch.cat(scores, -1).softmax(-1)
        mixed = shares[..., : stop - start] @ told
        for number, (_, value) in enumerate(mine):
            mixed = mixed + shares[..., stop - start + number, None] * value
        outs.append(mixed.transpose(0, 1))
    return torch.cat(outs)
