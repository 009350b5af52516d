"""Learn2PD: a small learned filter decides which tokens are final, and the canvas ends where the text does.

"Learning to Parallel" (2509.25188). The filter sees the confidences of all positions of the open block, decided ones
included, and says for each whether its prediction is what one token per pass would finally write: a network of block ->
block -> block with one ReLU between (the paper's size of 2,112 parameters for blocks of 32; its non-linearity is not
stated). Accepted tokens are committed, and always the surest. `hasten train learn2pd` trains it, in minutes.

With `end` (EoTP) the canvas is cut behind the first accepted token that ends the text; if there is none, behind the
surest masked position of the canvas that would end it, if that has at least the probability `floor` (the paper has no
floor; an early, unsure end cuts off text). Positions behind the cut are computed no more. Exactness: lossy, the cut
included, since what was behind it was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.engine import Knob, Request, Target, View, register
from hasten.errors import UserError, require
from hasten.files import replacing
from hasten.methods.diffusion.block_denoiser import BlockDenoiser, BlockParameters

FILE = "learn2pd.safetensors"


@dataclass(frozen=True)
class Learn2PDParameters(BlockParameters):
    """`accept` is compared with the filter's sigmoid; `filter` is its file, by default the checkpoint's own. `block` is
    what the filter was trained for; 0 leaves that to the filter.

    Raises:
        UserError: out of range.
    """

    least_block: ClassVar[int] = 0

    block: int = 0
    accept: float = 0.96
    end: bool = True
    floor: float = 0.5
    filter: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            (self.accept >= 0, "accept must not be negative"),
            (0 <= self.floor <= 1, "floor must be between 0 and 1"),
            (self.part == 0, "part must be 0: the filter sees whole blocks"),
        )
        require(checks, "learn2pd")


def new_filter(block: int) -> nn.Sequential:
    """An untrained filter: confidences [.., block] to logits [.., block]."""
    return nn.Sequential(nn.Linear(block, block), nn.ReLU(), nn.Linear(block, block))


def save_filter(network: nn.Sequential, file: Path) -> None:
    """Write a filter where `learn2pd` finds it.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(file) as fresh:
        save_file({name: value.detach().contiguous() for name, value in network.state_dict().items()}, fresh)


def load_filter(file: Path) -> nn.Sequential:
    """A filter as `save_filter` wrote it.

    Raises:
        UserError: no such file, not a filter, or one that is not finite.
    """
    try:
        tensors = load_file(file)
        network = new_filter(tensors["0.weight"].shape[0])
        network.load_state_dict(tensors)
    except FileNotFoundError:
        raise UserError(
            f"learn2pd needs a trained filter, and there is none at {file}: "
            "`hasten train learn2pd --model MODEL` makes it"
        ) from None
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        raise UserError(f"{file} is not a filter of learn2pd") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{file} holds NaN or infinity: the filter is damaged")
    return network.eval()


def own_filter(target: Target) -> dict[str, Any]:
    """A checkpoint's own filter."""
    own = None if target.folder is None else Path(target.folder)
    return {} if own is None or own.is_file() else {"filter": str(own / FILE)}


@register(
    "learn2pd",
    role="denoiser",
    family="diffusion",
    exactness="lossy",
    paper="2509.25188",
    title="Learn2PD: a learned filter says what is final",
    parameters=Learn2PDParameters,
    needs_training=True,
    knob=Knob("accept", (0.99, 0.96, 0.9, 0.8, 0.6)),
    defaults=own_filter,
)
class Learn2PD(BlockDenoiser[Learn2PDParameters]):
    """Commits what the filter takes for final, and ends the canvas behind a predicted end of text.

    Raises:
        UserError: no filter, or one for blocks of another size.
    """

    beyond = True

    def __init__(self, target: Target, parameters: Learn2PDParameters) -> None:
        super().__init__(target, parameters)
        if not parameters.filter:
            raise UserError("learn2pd: say where its filter is (learn2pd:filter=FILE)")
        self.network = load_filter(Path(parameters.filter))
        self.width: int = self.network[0].in_features  # type: ignore[assignment]
        own = None if self.config is None else self.config.block
        size = own or parameters.block or self.width
        if size != self.width:
            raise UserError(f"learn2pd: the filter is for blocks of {self.width}, not of {size}")
        self.parameters = replace(parameters, block=size)

    def update(self, request: Request, view: View) -> None:
        accepted = view.open & (self.judge(view) > self.parameters.accept)
        end = self._end(view, accepted) if self.parameters.end else None
        if end is not None:
            view.canvas.truncate(view.start + end + 1)
        kept = torch.arange(len(view.masked)) < view.canvas.length - view.start
        view.commit(kept & accepted | view.best(torch.where(kept, view.confidence, -1.0)))

    def judge(self, view: View) -> Tensor:
        """float32 [rows]: how likely each row of the open part is final, by the filter; 0 behind it."""
        with torch.inference_mode():
            verdict = torch.sigmoid(self.network(block_confidences(view, self.width)))
        result = torch.zeros(len(view.masked))
        result[: view.active] = verdict[: view.active]
        return result

    def _end(self, view: View, accepted: Tensor) -> int | None:
        """The row behind which the canvas is cut."""
        first = (accepted & view.ends).nonzero()
        if len(first):
            return int(first[0])
        likely = torch.where(view.masked & view.ends, view.confidence, -1.0)
        return int(likely.argmax()) if float(likely.max()) >= self.parameters.floor else None


def block_confidences(view: View, width: int) -> Tensor:
    """float32 [width]: the filter's input, the confidences of the open block, 0 where it has fewer positions."""
    padded = torch.zeros(width)
    padded[: view.active] = view.confidence[: view.active].float()
    return padded
