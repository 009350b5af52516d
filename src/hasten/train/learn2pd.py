"""Train Learn2PD's filter (2509.25188) for a diffusion model: `hasten train learn2pd`.

Each prompt is decoded one token per pass, up to the end of the text; that is the reference. Then it is decoded again by
the paper's oracle (extremely greedy parallel decoding): a position is committed as soon as its prediction is the
reference. What the confidences of the block were at each step, and which predictions were right, is what the filter
learns from. What is behind the end says nothing: a decoder never comes there, and end tokens are all that stands there.
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
from hasten.files import make_folder
from hasten.llm import LLM
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters
from hasten.methods.diffusion.learn2pd import FILE, block_confidences, new_filter, save_filter
from hasten.train.data import training_examples

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


@dataclass(frozen=True)
class Look:
    """What a block looked like at one step of `prompt`, [block] each.

    `confidences` float32, the filter's input. Bool: `right` predictions; `known` positions, of which the reference says
    what is right; `masked` ones of these; `ends`, predicted to be the end of the text.
    """

    prompt: tuple[int, ...]
    confidences: Tensor
    right: Tensor
    known: Tensor
    masked: Tensor
    ends: Tensor


class Replay(BlockDenoiser[BlockParameters]):
    """Commits what is right, by a reference per request, and keeps what the filter would have seen.

    Attributes:
        looks: one per step.
    """

    def __init__(self, target: Target, parameters: BlockParameters, width: int) -> None:
        super().__init__(target, parameters)
        self.width = width
        self.references: dict[int, Tensor] = {}
        self.looks: list[Look] = []
        self._last: dict[int, tuple[int, Tensor]] = {}

    def update(self, request: Request, view: View) -> None:
        reference = self.references[request.id]
        places = torch.arange(len(view.masked)) + view.start - request.prompt_length
        known = (places >= 0) & (places < len(reference))
        wanted = reference[places.clamp(0, len(reference) - 1)]
        right, masked = known & (view.tokens == wanted), view.open & known
        prompt = tuple(request.tokens[: request.prompt_length])
        columns = (self._padded(view, column) for column in (right, known, masked, view.ends))
        self.looks.append(Look(prompt, block_confidences(view, self.width), *columns))
        start, before = self._last.get(request.id, (-1, view.tokens))
        stuck = start == view.start and torch.equal(before, view.tokens)
        self._last[request.id] = (view.start, view.tokens)
        if stuck:
            # Twice the same predictions: what is left of the block is taken from the reference.
            rows = masked.nonzero().squeeze(1)
            view.canvas.commit(view.start + rows, wanted[rows])
            del self._last[request.id]
        else:
            view.commit(masked & right)

    def _padded(self, view: View, column: Tensor) -> Tensor:
        """The open block's rows of a column, False where it has fewer positions."""
        padded = torch.zeros(self.width, dtype=torch.bool)
        padded[: view.active] = column[: view.active]
        return padded

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
        What a card says: records, and `fit`'s figures.

    Raises:
        UserError: not a diffusion model, hardly any prompt fits its context, or the file or its folder cannot be made.
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
            _replay(engine, replay, ids, SamplingParams(max_tokens=room), width)
        report(1)
    network, figures = fit(replay.looks, config)
    save_filter(network, file)
    return {"output": str(file), "block": width, "records": len(replay.looks)} | figures


def _replay(engine: Engine, replay: Replay, ids: list[int], params: SamplingParams, width: int) -> None:
    """One prompt: the reference, then the oracle."""
    reference = engine.add(ids, params, f"denoise:block={width}")[0]
    for _ in engine.run():
        pass
    request = engine.add(ids, params, replay)[0]
    replay.references[request.id] = torch.tensor(reference.output)
    for _ in engine.run():
        pass


def fit(looks: Sequence[Look], config: FilterConfig) -> tuple[torch.nn.Sequential, dict[str, Any]]:
    """The filter that predicts rightness from confidences, and how well it does on a held-out tenth of the prompts.

    The looks at one prompt are much alike, so that none of a held-out prompt may be trained on.

    Returns:
        The filter. Its last `loss`; of masked positions of held-out prompts, at the threshold `REPORT_AT`: the share of
        what is accepted that is right (`precision`) and of what is right that is accepted (`recall`), and the same of
        predictions that the text ends (`end_precision`, `end_recall`), which are not in the former.

    Raises:
        UserError: the looks are of fewer than two prompts.
    """
    prompts = list(dict.fromkeys(look.prompt for look in looks))
    if len(prompts) < 2:
        raise UserError("learn2pd: fewer than two different prompts leave room in the model's context")
    torch.manual_seed(config.seed)
    order = torch.randperm(len(prompts)).tolist()
    held_out = {prompts[number] for number in order[: max(1, int(TEST_SHARE * len(order)))]}
    train = _stack([look for look in looks if look.prompt not in held_out])
    test = _stack([look for look in looks if look.prompt in held_out])
    network = new_filter(train["confidences"].shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    counted = train["masked"] if config.masked_only else train["known"]
    right = train["right"][counted].float()
    for _ in range(config.epochs):
        loss = F.binary_cross_entropy_with_logits(network(train["confidences"])[counted], right)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.inference_mode():
        accepted = torch.sigmoid(network(test["confidences"])) > REPORT_AT
    figures = {"loss": round(loss.item(), 4)}
    for name, inside in (("", test["masked"] & ~test["ends"]), ("end_", test["masked"] & test["ends"])):
        good = int((accepted & test["right"] & inside).sum())
        figures[name + "precision"] = round(good / max(1, int((accepted & inside).sum())), 4)
        figures[name + "recall"] = round(good / max(1, int((test["right"] & inside).sum())), 4)
    return network, figures


def _stack(looks: Sequence[Look]) -> dict[str, Tensor]:
    """The columns of looks, [looks, block] each."""
    names = ("confidences", "right", "known", "masked", "ends")
    return {name: torch.stack([getattr(look, name) for look in looks]) for name in names}
