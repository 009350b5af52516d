"""Learn2PD: a filter that decides, a canvas that ends with the text, and the oracle that teaches the filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from canvases import BLOCK, CONFIGS, PROMPTS, by_position, canvas_of, committed, decode, oracle, view_of
from torch import nn

from hasten.engine import Engine, Request, SamplingParams
from hasten.errors import UserError
from hasten.methods.diffusion.block_denoiser import BlockParameters
from hasten.methods.diffusion.learn2pd import block_confidences, load_filter, new_filter, save_filter
from hasten.model import Model
from hasten.train.learn2pd import Replay

NOBODY: Any = None
END = 10


def write(file: Path, bias: float = 0.0, gain: float = 0.0) -> Path:
    """A filter that says `bias + gain * confidence` of every position."""
    network = new_filter(BLOCK)
    with torch.no_grad():
        for layer, scale in ((network[0], 1.0), (network[2], gain)):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(scale * torch.eye(BLOCK))
            layer.bias.fill_(0.0)
        assert isinstance(network[2], nn.Linear)
        network[2].bias.fill_(bias)
    save_filter(network, file)
    return file


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Accepts nothing."""
    return write(tmp_path_factory.mktemp("filter") / "nothing.safetensors", bias=-20.0)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Accepts everything."""
    return write(tmp_path_factory.mktemp("filter") / "everything.safetensors", bias=20.0)


# The filter


def test_a_filter_comes_back_as_it_was_written(tmp_path: Path) -> None:
    network = new_filter(BLOCK)
    save_filter(network, tmp_path / "filter.safetensors")
    confidences = torch.rand(5, BLOCK)
    assert torch.equal(load_filter(tmp_path / "filter.safetensors")(confidences), network(confidences))
    assert sum(weights.numel() for weights in new_filter(32).parameters()) == 2112


def test_a_filter_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, nothing: Path) -> None:
    file = tmp_path / "filter.safetensors"
    file.write_bytes(nothing.read_bytes())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hasten.methods.diffusion.learn2pd.save_file", half_saved)
        save_filter(new_filter(BLOCK), file)
    (tmp_path / "filter.safetensors.new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*filter\.safetensors: Is a directory"):
        save_filter(new_filter(BLOCK), file)
    assert file.read_bytes() == nothing.read_bytes()


def half_saved(tensors: object, file: Path) -> None:
    file.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_filter_is_finite(value: float, tmp_path: Path) -> None:
    network = new_filter(BLOCK)
    with torch.no_grad():
        network[2].bias[1] = value
    save_filter(network, tmp_path / "filter.safetensors")
    with pytest.raises(UserError, match=r"filter.safetensors holds NaN or infinity"):
        load_filter(tmp_path / "filter.safetensors")


def test_what_is_no_filter(tmp_path: Path, nothing: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    nn_other = {"other": torch.zeros(2)}
    torch.save(nn_other, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="is not a filter of learn2pd"):
            load_filter(tmp_path / name)
    with pytest.raises(UserError, match="needs a trained filter, and there is none at"):
        load_filter(tmp_path / "absent")
    with pytest.raises(UserError, match="for blocks of 4, not of 32"):
        Engine(oracle("full-same")).drafter(f"learn2pd:block=32,filter={nothing}")
    with pytest.raises(UserError, match="block must be at least 0"):
        Engine(oracle("full-same")).drafter(f"learn2pd:block=-1,filter={nothing}")
    for name in ("full-same", "block-causal-same"):
        method: Any = Engine(oracle(name)).drafter(f"learn2pd:filter={nothing}")[1]
        assert method.width == method.parameters.block == 4


def test_the_filter_sees_the_whole_block(tmp_path: Path) -> None:
    """Decided positions too, and nothing behind the block; what it accepts comes with the surest."""
    view = view_of([0.9, 0.5, 0.8, 0.7, 0.99], [False, True, True, True, True], active=4)
    seen = block_confidences(view, BLOCK)
    torch.testing.assert_close(seen, torch.tensor([0.9, 0.5, 0.8, 0.7]), atol=1e-6, rtol=0)
    short = view_of([0.9, 0.5], active=2)
    assert block_confidences(short, BLOCK)[2:].tolist() == [0, 0]
    # The sigmoid of 40 c - 26 is above 0.5 where c is above 0.65.
    file = write(tmp_path / "filter.safetensors", -26.0, 40.0)
    method: Any = Engine(oracle("full-same")).drafter(f"learn2pd:block=4,accept=0.5,filter={file}")[1]
    method.update(NOBODY, view)
    assert committed(view) == {2, 3}
    view = view_of([0.6, 0.5, 0.4, 0.3])
    method.update(NOBODY, view)
    assert committed(view) == {0}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_filter_that_accepts_nothing(name: str, everything: Path, nothing: Path) -> None:
    for prompt in PROMPTS[1:4]:
        static = canvas_of(decode(oracle(name), "denoise:block=4", prompt, max_tokens=9))
        for spec in (
            f"learn2pd:block=4,end=false,accept=1.1,filter={everything}",
            f"learn2pd:block=4,filter={nothing}",
        ):
            ours = canvas_of(decode(oracle(name), spec, prompt, max_tokens=9))
            assert ours.ids.tolist() == static.ids.tolist()
            assert ours.committed_at.tolist() == static.committed_at.tolist()


# The oracle


def replayed(model: Model, prompt: list[int], answer: list[int]) -> tuple[Request, Replay]:
    """The oracle, to which this is the right answer."""
    engine = Engine(model)
    replay = Replay(engine.target, BlockParameters(block=BLOCK), BLOCK)
    (request,) = engine.add(prompt, SamplingParams(max_tokens=len(answer)), replay)
    replay.references[request.id] = torch.tensor(answer)
    for _ in engine.run():
        pass
    assert not replay.references
    return request, replay


@pytest.mark.parametrize("name", CONFIGS)
def test_the_oracle_reproduces_the_reference(name: str) -> None:
    sooner = 0
    for number in range(12):
        prompt = [number % 10, 3, number % 7]
        static = decode(oracle(name), "denoise:block=4", prompt, max_tokens=8)
        request, _ = replayed(oracle(name), prompt, static.output)
        assert request.output == static.output
        sooner += request.statistics.steps < static.statistics.steps
    assert sooner > 6


@pytest.mark.parametrize("name", ["full-same", "full-shifted", "block-causal-same", "context-causal-same"])
@pytest.mark.parametrize(("answer", "looks"), [([8] * 8, 4), ([0] * 4 + [8] * 4, 3), ([0] * 8, 2)])
def test_where_nothing_more_becomes_right_the_reference_is_taken(name: str, answer: list[int], looks: int) -> None:
    """Everything is predicted to be 0. It takes two looks at a block to be stuck: two blocks may well say the same."""
    request, replay = replayed(oracle(name, by_position({}, {})), PROMPTS[2], answer)
    assert request.output == answer
    assert len(replay.looks) == looks


# The end of the text


def ending(place: int) -> Any:
    """Everything is nearly sure; the end stands at `place`, surest of all."""
    return by_position({place: END}, {place: 9.0} | {other: 4.0 - other / 10 for other in range(30) if other != place})


@pytest.mark.parametrize(
    ("name", "options", "place", "rows"),
    [
        # 5 tokens and 12 masks, blocks from 5 on; the end at 7 is also the surest, so that 5 and 6 are left.
        ("full-same", "", 7, [17, 8, 8]),
        ("full-same", ",cache=prefix", 7, [17, 3, 3]),
        ("full-same", ",cache=dual", 7, [17, 3, 3]),
        ("full-shifted", ",cache=prefix", 7, [17, 4, 4]),
        ("full-shifted", ",cache=dual", 7, [17, 4, 4]),
        # At 10, in the second block, whose positions before it wait for their turn.
        ("full-same", "", 10, [17, *[11] * 5]),
        ("full-same", ",cache=prefix", 10, [17, 6, 6, 6, 11, 2]),
        ("full-same", ",cache=dual", 10, [17, 4, 4, 4, 11, 2]),
        # Blocks from 0 on: the prompt's, and what is left of the second. Later ones are not begun.
        ("block-causal-same", "", 6, [4, 4, 3]),
        ("block-causal-same", "", 7, [4, 4, 4, 4]),
        # The first position of a block comes with the prompt, or with the block before.
        ("context-causal-shifted", "", 7, [5, 4, 3]),
        ("context-causal-same", "", 7, [5, 4, 3, 3]),
    ],
)
def test_behind_the_end_nothing_is_computed_or_written(
    name: str, options: str, place: int, rows: list[int], nothing: Path
) -> None:
    model = oracle(name, ending(place))
    spec = f"learn2pd:block=4,filter={nothing}{options}"
    request = decode(model, spec, PROMPTS[3], end_ids=[END], max_tokens=12)
    assert request.output == [*[0] * (place - 5), END]
    assert request.finish_reason == "stop"
    assert model.rows() == rows
    canvas = canvas_of(request)
    assert canvas.length == place + 1
    assert canvas.masked[place + 1 :].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_accepted_behind_the_end_is_not_written(name: str, everything: Path) -> None:
    request = decode(
        oracle(name, ending(7)), f"learn2pd:block=4,filter={everything}", PROMPTS[3], end_ids=[END], max_tokens=12
    )
    assert request.output == [0, 0, END]
    assert canvas_of(request).masked[8:].all()


def test_a_cut_drops_cached_slots_behind_it(nothing: Path) -> None:
    """The dual cache holds 0 to 4 and 9 to 16; the end at 10 leaves two of the latter."""
    engine = Engine(oracle("full-same", ending(10)), end_ids=[END])
    (request,) = engine.add(PROMPTS[3], SamplingParams(max_tokens=12), f"learn2pd:block=4,cache=dual,filter={nothing}")
    engine.step()
    assert request.sequence.length == 5 + 2
    ((block, length),) = request.sequence.memory(0)
    assert block.positions[:length].tolist() == [0, 1, 2, 3, 4, 9, 10]
    engine.abort(request)


def test_the_first_accepted_end_comes_before_the_surest(everything: Path, nothing: Path) -> None:
    law = by_position({6: END, 8: END, 14: END}, {6: 3.0, 8: 6.0, 14: 9.0})
    for file, place in ((everything, 6), (nothing, 14)):
        engine = Engine(oracle("full-same", law), end_ids=[END])
        (request,) = engine.add(PROMPTS[3], SamplingParams(max_tokens=12), f"learn2pd:block=4,filter={file}")
        engine.step()
        assert canvas_of(request).length == place + 1
        engine.abort(request)


def test_an_unsure_end_cuts_nothing(nothing: Path) -> None:
    """The end leads by one nat: its probability is about a fifth."""
    law = by_position({9: END}, {9: 1.0})
    for floor, length in ((0.5, 17), (0.25, 17), (0.15, 10), (0.0, 10)):
        engine = Engine(oracle("full-same", law), end_ids=[END])
        spec = f"learn2pd:block=4,floor={floor},filter={nothing}"
        (request,) = engine.add(PROMPTS[3], SamplingParams(max_tokens=12), spec)
        engine.step()
        assert canvas_of(request).length == length
        engine.abort(request)
