"""Hidden transfer: pseudo states of the next tokens enter a middle layer, and the layers above make guesses of them.

"Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration", 2024, arXiv 2404.12022. At the
input of a layer, a linear map makes of a node's state that of the token j places behind it. The pseudo state then runs
through the rest of the layers beside the real ones, at its own position: it sees what its node sees, and the pseudo
states before it, so that it comes closer to what the true state would be; and the target's own head reads it. `hasten
train hidden-transfer` makes the maps. Exactness: lossless, greedy and sampling: nothing real sees a pseudo state, and
none is kept.

Of the paper only abstract and summaries were at hand, so these are decisions, not its own: all maps read the real row,
and at one layer; how many pseudo states a node gets is allotted as PPD's prompts are (`allotment.py`).

What a step costs: the nodes' rows in all layers, those of pseudo states above the layer. Where rows of another request
stand behind them in the pass, the native step computes them below it, too; PyTorch's does so always.

Format: `config.json` (`layer`, and what was measured) and `transfer` [pseudo states, hidden, hidden] in
`model.safetensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hasten.engine import SoftRows, Target, register
from hasten.errors import UserError
from hasten.methods.heads.files import (
    CONFIG,
    WEIGHTS,
    read_accuracy,
    read_config,
    read_tensors,
    require_names,
    require_shape,
    save,
)
from hasten.methods.heads.head import own_head, require_decoder
from hasten.methods.heads.probing import ProbeDrafter, ProbingParameters
from hasten.model import Join

SLUG, MAPS = "hidden-transfer", "transfer"


def pseudo_rows(maps: Tensor, layer: int, count: int) -> SoftRows:
    """The first so many pseudo states behind a node.

    Args:
        maps: float32 [pseudo states, hidden, hidden].
        layer: at whose input they enter.
    """
    sees = torch.ones(count, count, dtype=torch.bool).tril()
    states = torch.zeros(count, maps.shape[1])
    return SoftRows(states, tuple(range(1, count + 1)), sees, Join(layer, maps[:count]))


@dataclass(frozen=True)
class Transfer:
    """What was trained.

    Attributes:
        maps: [pseudo states, hidden, hidden].
        layer: at whose input they are taken, and enter.
        accuracy: per pseudo state, how often each rank was right on held-out text; empty where nobody measured it.
    """

    maps: Tensor
    layer: int
    accuracy: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def load(cls, folder: Path, hidden: int, layers: int) -> Self:
        """Read a folder.

        Args:
            hidden, layers: the target's width and depth.

        Raises:
            UserError: no maps, damaged ones, or some for another target.
        """
        file, config = folder / WEIGHTS, read_config(folder)
        if not file.exists():
            raise UserError(f"{SLUG}: there are no maps in {folder}: `hasten train {SLUG} --model MODEL` makes them")
        layer, tensors = config.get("layer"), read_tensors(file)
        if type(layer) is not int or not 0 <= layer < layers:
            raise UserError(f"{folder / CONFIG}: layer must be one of the target's, 0 to {layers - 1}, not {layer!r}")
        require_names(file, tensors, {MAPS})
        maps = tensors[MAPS]
        require_shape(file, MAPS, maps, len(maps) if maps.ndim else 0, hidden, hidden)
        if not 1 <= len(maps) <= 64:
            raise UserError(f"{file} must have 1 to 64 maps, not {len(maps)}")
        return cls(maps, layer, read_accuracy(folder / CONFIG, config, len(maps)))

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Write a folder.

        Args:
            config: what else the configuration says.

        Raises:
            UserError: it cannot be written.
        """
        accuracy = [list(ranks) for ranks in self.accuracy]
        told = {"model_type": SLUG, "layer": self.layer, "num_maps": len(self.maps), "accuracy": accuracy}
        save(folder, {**told, **config}, {MAPS: self.maps})


@register(
    SLUG,
    family="heads",
    exactness="lossless",
    paper="2404.12022",
    title="hidden transfer: states to come, from a middle layer",
    parameters=ProbingParameters,
    needs_training=True,
    command="hasten train hidden-transfer --model MODEL",
    defaults=own_head(SLUG),
)
class HiddenTransfer(ProbeDrafter):
    """See `ProbeDrafter`; its rows are pseudo states.

    Raises:
        UserError: no maps, or some for another target.
    """

    def __init__(self, target: Target, parameters: ProbingParameters) -> None:
        config = require_decoder(target, SLUG).config
        if not parameters.head:
            raise UserError(f"{SLUG} needs maps for this model: `hasten train {SLUG} --model MODEL` makes them")
        transfer = Transfer.load(Path(parameters.head), config.hidden_size, len(config.layers))
        maps = transfer.maps.float().to(target.model.device).contiguous()
        forms = [pseudo_rows(maps, transfer.layer, count) for count in range(1, len(maps) + 1)]
        super().__init__(target, SLUG, parameters, forms, transfer.accuracy)
