"""Linear layers whose weights are as GGUF files store them: in blocks of inputs that share scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.native.linear import LANES, BlockFormat, Panels, apart, codes_of, filled, interleave, nibbles
from hasten.model.native.rounding import BLOCK, Rounded, round_to_blocks, turn
from hasten.model.pages import room
from hasten.model.threads import on_one_thread
from hasten.model.weights import Blocks

AT_ONCE = 2**17
"""Bytes that become panels together: what is made of them on the way stays in the processor's cache."""
LEAST_INPUTS = 64
"""Inputs come in whole multiples of it: 16 words of codes."""

Read = Callable[[Tensor], tuple[Tensor, list[Tensor]]]
"""Of blocks [outputs, blocks, bytes]: codes uint8 [outputs, blocks, inputs], and what scales them in the order of the
panels, each float16 or int8 [outputs, blocks, n]."""


def _halfs(block: Tensor) -> Tensor:
    """Pairs of bytes as float16."""
    return block.contiguous().view(torch.float16)


def _split(codes: Tensor) -> Tensor:
    """Lower halves of all bytes, then upper ones."""
    return torch.cat([codes & 15, codes >> 4], -1)


def _q8_0(block: Tensor) -> tuple[Tensor, list[Tensor]]:
    return block[..., 2:] ^ 128, [_halfs(block[..., :2])]


def _q4_0(block: Tensor) -> tuple[Tensor, list[Tensor]]:
    return _split(block[..., 2:]), [_halfs(block[..., :2])]


def _q4_1(block: Tensor) -> tuple[Tensor, list[Tensor]]:
    return _split(block[..., 4:]), [_halfs(block[..., :4])]


def _q4_k(block: Tensor) -> tuple[Tensor, list[Tensor]]:
    # Eight scales and minima of 6 bits: those of the first four groups, and the lower bits of the others', whose upper
    # ones are beside the first.
    scale, minimum, rest = block[..., 4:8], block[..., 8:12], block[..., 12:16]
    scales = torch.cat([scale & 63, rest & 15 | scale >> 2 & 48], -1)
    minima = torch.cat([minimum & 63, rest >> 4 | minimum >> 2 & 48], -1)
    # Minima are taken away.
    signed = block[..., :4].clone()
    signed[..., 3] ^= 128
    codes = _split(torch.unflatten(block[..., 16:], -1, (4, 32))).flatten(-2)
    return codes, [_halfs(signed), torch.stack([scales, minima], -1).flatten(-2).view(torch.int8)]


def _q6_k(block: Tensor) -> tuple[Tensor, list[Tensor]]:
    low = _split(torch.unflatten(block[..., :128], -1, (2, 64)))
    top = torch.unflatten(block[..., 128:192], -1, (2, 32))
    high = torch.cat([top >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    codes = (low | high << 4).flatten(-2)
    return codes, [_halfs(block[..., 208:]), block[..., 192:208].contiguous().view(torch.int8)]


@dataclass(frozen=True)
class _Kind:
    """A block.

    Attributes:
        inputs, bytes: of it.
        read: takes it apart.
        offset: what a code is more than the number that it stands for.
        halfs: its float16 numbers: a scale, and a minimum if there are two.
    """

    inputs: int
    bytes: int
    read: Read
    offset: int
    halfs: int = 1


KINDS: dict[BlockFormat, _Kind] = {
    "Q8_0": _Kind(32, 34, _q8_0, offset=128),
    "Q4_0": _Kind(32, 18, _q4_0, offset=8),
    "Q4_1": _Kind(32, 20, _q4_1, offset=0, halfs=2),
    "Q4_K": _Kind(256, 144, _q4_k, offset=0, halfs=2),
    "Q6_K": _Kind(256, 210, _q6_k, offset=32),
}


def stored_format(stored: Sequence[Blocks]) -> BlockFormat | None:
    """The format of all of these; None where there is none, another one, or more than one."""
    types = {blocks.type for blocks in stored}
    return next((format for format in KINDS if types == {format}), None)


class BlockLinear(Panels):
    """Panels of stored blocks, at the same number of bytes (Q4_K: 148 for 144).

    Rows of inputs become int8 codes with a scale per 32 inputs (Q6_K: 16). Products within these are exact integers,
    and the scales of the weights are those of the file.

    Args:
        format: of the blocks.
        stored: uint8 [outputs, bytes per row]; it is not kept.
        inputs: weights per row; the last block may have more.
        bias: [outputs] or None.
        dtype: of the model, which `dequant` gives.
        turned: whether they are the blocks of `turn`ed weights. Inputs are turned, too, then.

    Raises:
        UserError: blocks that do not fill the rows.
    """

    def __init__(
        self,
        format: BlockFormat,
        stored: Tensor,
        inputs: int,
        bias: Tensor | None,
        dtype: torch.dtype,
        turned: bool = False,
    ) -> None:
        kind = KINDS[format]
        outputs, size = stored.shape
        blocks = -(-inputs // kind.inputs)
        if size != blocks * kind.bytes:
            raise UserError(f"{size} bytes are no row of {inputs} weights in {format}")
        step = max(1, AT_ONCE // size // (2 * LANES)) * 2 * LANES
        # As many small operations: a team of threads would wait for all its cores before each.
        with on_one_thread():
            parts = (_panels(format, part) for part in torch.split(stored, step))
            panels, worth = _joined(parts, -(-outputs // (2 * LANES)) * 2)
        self._kind = kind
        super().__init__(format, (outputs, inputs), dtype, panels, worth, bias, turned)

    @classmethod
    def rounded(cls, format: Rounded, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> BlockLinear:
        """Of a dense weight [outputs, inputs]. See `round_to_blocks`.

        Q8_0 is turned: the codes of inputs lose more than those of weights there. Q4_1 is not, so that weights that
        came from it are found again.
        """
        turned = format == "Q8_0"
        return cls(format, round_to_blocks(format, weight, turned), weight.shape[1], bias, dtype, turned)

    def dequant(self) -> Tensor:
        assert self.scales is not None
        codes = _unpack(self.format, self.panels).float() - self._kind.offset
        scales = _numbers(self.scales, self._kind.halfs)
        weight = torch.unflatten(codes, 1, (scales.shape[1], -1)) * scales[..., :1]
        if self._kind.halfs == 2:
            weight += scales[..., 1:]
        weight = weight.flatten(1)
        if self.turned:
            weight = turn(torch.unflatten(weight, 1, (-1, BLOCK))).flatten(1)
        return weight[: self.out_features, : self.in_features].to(self.dtype).contiguous()


def _panels(format: BlockFormat, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [outputs, bytes per row] as panels, an even number of them, and what scales these."""
    kind = KINDS[format]
    # Blocks of zeros have scales of zero.
    padded = filled(stored, rows=2 * LANES, columns=max(1, LEAST_INPUTS // kind.inputs) * kind.bytes)
    codes, scales = kind.read(torch.unflatten(padded, 1, (-1, kind.bytes)))
    return _pack(format, codes.flatten(1)), torch.cat([_by_panels(part) for part in scales], 2)


def _joined(parts: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Pairs joined along their first axis, `count` in all; each is put into its place as it comes."""
    whole: tuple[Tensor, Tensor] | None = None
    place = 0
    for part in parts:
        if whole is None:
            whole = room((count, *part[0].shape[1:]), part[0].dtype), room((count, *part[1].shape[1:]), part[1].dtype)
        for all_, some in zip(whole, part, strict=True):
            all_[place : place + len(some)] = some
        place += len(part[0])
    assert whole is not None and place == count
    return whole


def _pack(format: str, codes: Tensor) -> Tensor:
    """Codes [outputs, inputs] as panels."""
    if format == "Q8_0":
        return interleave(codes, 4)
    if format != "Q6_K":
        return nibbles(codes)
    low = torch.unflatten(nibbles(codes & 15), 1, (-1, 2))
    parts = (codes >> 4).view(-1, LANES, codes.shape[1] // 16, 4, 4)
    top = parts[:, :, :, 0] | parts[:, :, :, 1] << 2 | parts[:, :, :, 2] << 4 | parts[:, :, :, 3] << 6
    return torch.cat([low, top.transpose(1, 2).unsqueeze(2)], 2)


def _unpack(format: str, panels: Tensor) -> Tensor:
    """Back from `_pack`."""
    if format == "Q8_0":
        return apart(panels)
    if format != "Q6_K":
        return codes_of(panels)
    low, top = codes_of(panels[:, :, :2].flatten(1, 2)), panels[:, :, 2].transpose(1, 2)
    parts = torch.stack([top >> shift & 3 for shift in (0, 2, 4, 6)], 3)
    return low | parts.reshape(low.shape).short() << 4


def _by_panels(part: Tensor) -> Tensor:
    """[outputs, blocks, n] as bytes [outputs / 16, blocks, bytes of 16 outputs]."""
    return torch.unflatten(part, 0, (-1, LANES)).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)


def _by_outputs(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Back from `_by_panels`, as float32."""
    values = torch.unflatten(part.contiguous().view(dtype), 2, (-1, LANES))
    return values.permute(0, 3, 1, 2).flatten(0, 1).float()


def _numbers(scales: Tensor, halfs: int) -> Tensor:
    """Of each group its scale, and its minimum where there is one: [outputs, groups, halfs]."""
    size = halfs * 2 * LANES
    own, rest = scales[:, :, :size], scales[:, :, size:]
    numbers = _by_outputs(own, torch.float16).unsqueeze(2)
    if rest.shape[2]:
        numbers = numbers * torch.unflatten(_by_outputs(rest, torch.int8), 2, (-1, halfs))
    return numbers.flatten(1, 2)
