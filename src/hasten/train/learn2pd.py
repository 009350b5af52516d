"""Train Learn2PD's filter (2509.25188) for a diffusion model: `hasten train learn2pd`.

Each prompt is decoded one token per pass; that is the reference. Then it is decoded again by the paper's oracle
(extremely greedy parallel decoding): a position is committed as soon as its prediction is the reference. What the
confidences of the block were at each step, and which predictions were right, is what the filter learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.engine import Engine, Request, SamplingParams, Target, View
from hasten.errors import UserError, require, require_finite
from hasten.llm import LLM
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters
from hasten.methods.diffusion.learn2pd import FILE, block_confidences, new_filter, save_filter
from hasten.train.data import training_examples
from hasten.train.trainer import make_folder

TEST_SHARE = 0.1
DIFFICULTY = 0.3
"""Of the prompts, which are decoded one token per pass."""
REPORT_AT = 0.96
"""The acceptance threshold at which the card's figures are taken: the method's default."""


@dataclass(frozen=True)
class FilterConfig:
    """`prompts` of the training split, each on a `canvas` of so many positions; `epochs` of full-batch AdamW at `lr`.

    `masked_only` takes the loss at masked positions: decided ones are right by construction. The paper has all.

    Raises:
        UserError: out of range.
    """

    prompts: int = 300
    block: int = 32
    canvas: int = 96
    epochs: int = 2000
    lr: float = 3e-3
    masked_only: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.prompts >= 10, "prompts must be at least 10"),
            (self.block >= 1 and self.canvas >= 1, "block and canvas must be at least 1"),
            (self.epochs >= 1 and self.lr > 0, "epochs and lr must be positive"),
        )
        require(checks, "learn2pd")
        require_finite(self, "learn2pd")


class Replay(BlockDenoiser[BlockParameters]):
    """Commits what is right, by a reference per request, and keeps what the filter would have seen.

    Attributes:
        records: per step, confidences, rightness and masks of the open block, [block] each.
    """

    def __init__(self, target: Target, parameters: BlockParameters, width: int) -> None:
        super().__init__(target, parameters)
        self.width = width
        self.references: dict[int, Tensor] = {}
        self.records: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last: dict[int, tuple[int, Tensor]] = {}

    def update(self, request: Request, view: View) -> None:
        reference = self.references[request.id]
        places = torch.arange(len(view.masked)) + view.start - request.prompt_length
        known = reference[places.clamp(0, len(reference) - 1)]
        right = (places >= 0) & (places < len(reference)) & (view.tokens == known)
        padded, open_ = torch.zeros(self.width, dtype=torch.bool), torch.zeros(self.width, dtype=torch.bool)
        padded[: view.active], open_[: view.active] = right[: view.active], view.open[: view.active]
        self.records.append((block_confidences(view, self.width), padded, open_))
        start, before = self._last.get(request.id, (-1, view.tokens))
        stuck = start == view.start and torch.equal(before, view.tokens)
        self._last[request.id] = (view.start, view.tokens)
        if stuck:
            # Twice the same predictions: what is left of the block is taken from the reference.
            rows = view.open.nonzero().squeeze(1)
            view.canvas.commit(view.start + rows, known[rows])
            del self._last[request.id]
        else:
            view.commit(view.open & right)

    def end(self, request: Request) -> None:
        self.references.pop(request.id, None)
        self._last.pop(request.id, None)


def train_filter(
    llm: LLM, config: FilterConfig, output: Path | None = None, report: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Train a filter and write it.

    Args:
        output: its file; into the model's folder if None.
        report: called with 1 for each prompt that was decoded twice.

    Returns:
        What a card says: records, figures on the held-out tenth at masked positions.

    Raises:
        UserError: not a diffusion model, or the file or its folder cannot be made.
    """
    diffusion = llm.model.config.diffusion
    if diffusion is None:
        raise UserError("learn2pd needs a model that fills masked positions")
    width = diffusion.block or config.block
    file = output or Path(llm.folder) / FILE
    make_folder(file.parent)
    engine = llm.engine
    replay = Replay(engine.target, BlockParameters(block=width), width)
    for example in training_examples(config.prompts, config.seed, DIFFICULTY):
        ids = llm.encode(example.prompt)
        room = min(config.canvas, llm.model.config.max_positions - len(ids))
        if room > 0:
            _replay(engine, replay, ids, SamplingParams(max_tokens=room, ignore_eos=True), width)
        report(1)
    network, figures = fit(replay.records, config)
    save_filter(network, file)
    return {"output": str(file), "block": width, "records": len(replay.records)} | figures


def _replay(engine: Engine, replay: Replay, ids: list[int], params: SamplingParams, width: int) -> None:
    """One prompt: the reference, then the oracle."""
    reference = engine.add(ids, params, f"denoise:block={width}")[0]
    for _ in engine.run():
        pass
    request = engine.add(ids, params, replay)[0]
    replay.references[request.id] = torch.tensor(reference.output)
    for _ in engine.run():
        pass


def fit(
    records: Sequence[tuple[Tensor, Tensor, Tensor]], config: FilterConfig
) -> tuple[torch.nn.Sequential, dict[str, Any]]:
    """The filter that predicts rightness from confidences, and how well it does on held-out steps."""
    torch.manual_seed(config.seed)
    confidences, right, masked = (torch.stack(column) for column in zip(*records, strict=True))
    order = torch.randperm(len(records))
    test, train = order[: max(1, int(TEST_SHARE * len(order)))], order[max(1, int(TEST_SHARE * len(order))) :]
    network = new_filter(confidences.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    counted = masked[train] if config.masked_only else torch.ones_like(masked[train])
    for _ in range(config.epochs):
        loss = F.binary_cross_entropy_with_logits(network(confidences[train])[counted], right[train][counted].float())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.inference_mode():
        accepted = (torch.sigmoid(network(confidences[test])) > REPORT_AT) & masked[test]
    good = accepted & right[test]
    return network, {
        "loss": round(loss.item(), 4),
        "precision": round(float(good.sum() / accepted.sum().clamp(min=1)), 4),
        "recall": round(float(good.sum() / (right[test] & masked[test]).sum().clamp(min=1)), 4),
    }
