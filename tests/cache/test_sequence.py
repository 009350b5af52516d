"""Whatever is done to a sequence, it gives the logits of a fresh prefill of the tokens that it should contain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.cache import Cache, Replay, RollbackError, SequenceCache, StatePerRow
from hasten.cache.block import Block
from hasten.errors import UserError
from hasten.model import LayerConfig, Model, OracleModel, Rows, Slots, SlotsOf, Span, State, load_model
from hasten.model.layout import Layout, by_shape

VOCABULARY = 97
Make = Callable[..., Any]


# The programs of the property test


@dataclass(frozen=True)
class Step:
    """One operation on one of the live sequences; raw numbers are taken modulo what is possible."""

    kind: str
    which: int = 0
    number: int = 0
    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    inference: bool = False


def steps() -> st.SearchStrategy[Step]:
    which, number = st.integers(0, 5), st.integers(0, 1000)
    token = st.integers(0, VOCABULARY - 1)

    def some(most: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.lists(token, min_size=1, max_size=most).map(tuple)

    tree = st.lists(number, max_size=8).map(tuple)
    mode = st.booleans()
    return st.one_of(
        st.builds(Step, st.just("chain"), which, number, some(25), inference=mode),
        st.builds(Step, st.just("tree"), which, number, some(9), tree, inference=mode),
        st.builds(Step, st.just("discard"), which, number, some(9), tree, inference=mode),
        st.builds(Step, st.just("packed"), which, number, some(9), tree, inference=mode),
        st.builds(Step, st.just("grow"), which, number, some(9), tree, inference=mode),
        st.builds(Step, st.just("lengthen"), which, number, some(12), inference=mode),
        st.builds(Step, st.sampled_from(["crop", "fork", "probe", "reserve"]), which, number, inference=mode),
        st.builds(Step, st.sampled_from(["crop", "fork", "release"]), which, number),
    )


@dataclass
class Tree:
    """Random rows behind a sequence: row 0 is the root, every other row has an earlier one as its parent."""

    tokens: list[int]
    parents: list[int]

    @classmethod
    def of(cls, step: Step) -> Tree:
        count = min(len(step.tokens), len(step.parents) + 1)
        parents = [-1] + [step.parents[row - 1] % row for row in range(1, count)]
        return cls(list(step.tokens[:count]), parents)

    def path(self, row: int) -> list[int]:
        """Rows from the root to this one, ascending."""
        rows: list[int] = []
        while row >= 0:
            rows.insert(0, row)
            row = self.parents[row]
        return rows

    def mask(self) -> Tensor:
        mask = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for row in range(len(self.tokens)):
            mask[row, self.path(row)] = True
        return mask

    def depths(self) -> list[int]:
        return [len(self.path(row)) - 1 for row in range(len(self.tokens))]


def rows_of(tree: Tree, sequence: SequenceCache) -> Rows:
    positions = torch.tensor(tree.depths()) + sequence.length
    span = Span(sequence, 0, len(tree.tokens), tree.mask())
    return Rows(torch.tensor(tree.tokens), positions, [span])


@dataclass
class Machine:
    """Runs a program on sequences of one cache, and knows which tokens each must contain."""

    model: Model
    cache: Cache
    live: list[tuple[SequenceCache, list[int]]] = field(default_factory=list)
    _fresh: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def run(self, program: list[Step]) -> None:
        for step in program:
            if not self.live:
                self.live.append((self.cache.sequence(), []))
            sequence, tokens = self.live[step.which % len(self.live)]
            with torch.inference_mode(step.inference):
                getattr(self, step.kind)(step, sequence, tokens)
            self.audit()
        for sequence, tokens in self.live:
            self.probe(Step("probe"), sequence, tokens)
        for sequence, _ in self.live:
            sequence.release()
        assert self.cache.used_bytes == 0

    def fresh(self, tokens: list[int]) -> Tensor:
        """Logits of all tokens, by a prefill in one piece."""
        key = tuple(tokens)
        if key not in self._fresh:
            cache = Cache(self.cache.layers, self.cache.dtype, self.cache.device)
            self._fresh[key] = self.model.forward(Rows.of(cache.sequence(), tokens, 0))
        return self._fresh[key]

    def check(self, logits: Tensor, tokens: list[int]) -> None:
        """These are the logits behind the last tokens."""
        expected = self.fresh(tokens)[len(tokens) - len(logits) :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    def audit(self) -> None:
        """References and bytes are those of the live sequences, and nobody's part is empty."""
        holders: dict[Block, int] = {}
        for sequence, tokens in self.live:
            assert sequence.length == len(tokens)
            for group in range(len(sequence.groups)):
                memory = sequence.memory(group) or []
                assert all(length for _, length in memory[:-1])
                for block, length in memory:
                    holders[block] = holders.get(block, 0) + 1
                    assert length <= block.capacity
        assert all(block.references == count for block, count in holders.items())
        assert self.cache.used_bytes == sum(block.nbytes() for block in holders)
        assert self.cache.used_bytes <= self.cache.peak_bytes

    # Operations

    def chain(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """Append tokens and keep all of them, or the first few."""
        logits = self.model.forward(Rows.of(sequence, list(step.tokens), len(tokens)))
        self.check(logits, [*tokens, *step.tokens])
        count = len(step.tokens) if step.number % 2 else step.number // 2 % (len(step.tokens) + 1)
        sequence.commit(count if step.number % 3 else list(range(count)))
        tokens += step.tokens[:count]

    def tree(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """Append a tree and keep the path to one of its nodes."""
        tree = Tree.of(step)
        self.check_tree(tree, self.model.forward(rows_of(tree, sequence)), tokens)
        kept = tree.path(step.number % len(tree.tokens))
        sequence.commit(kept)
        tokens += [tree.tokens[row] for row in kept]

    def check_tree(self, tree: Tree, logits: Tensor, tokens: list[int]) -> None:
        for row in range(len(tree.tokens)):
            path = [tree.tokens[node] for node in tree.path(row)]
            self.check(logits[row : row + 1], tokens + path)

    def discard(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """A forward pass of which nothing is kept."""
        self.model.forward(rows_of(Tree.of(step), sequence))
        if step.number % 2:
            sequence.commit(0)

    def packed(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """A tree on one sequence and a chain on another in the same forward pass."""
        others = [item for item in self.live if item[0] is not sequence]
        if not others:
            return self.tree(step, sequence, tokens)
        other, other_tokens = others[step.number % len(others)]
        tree = Tree.of(step)
        first, second = rows_of(tree, sequence), Rows.of(other, list(step.tokens), len(other_tokens))
        count = len(tree.tokens)
        rows = Rows(
            torch.cat([first.tokens, second.tokens]),
            torch.cat([first.positions, second.positions]),
            [first.spans[0], Span(other, count, count + len(step.tokens))],
        )
        logits = self.model.forward(rows)
        self.check_tree(tree, logits[:count], tokens)
        self.check(logits[count:], [*other_tokens, *step.tokens])
        kept = tree.path(step.number % count)
        sequence.commit(kept)
        tokens += [tree.tokens[row] for row in kept]
        other.commit(len(step.tokens))
        other_tokens += step.tokens

    def grow(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """As `tree`, but in several passes that extend what is pending, with a fork in between."""
        tree = Tree.of(step)
        count, size = len(tree.tokens), 1 + step.number % 3
        mask, positions = tree.mask(), torch.tensor(tree.depths()) + sequence.length
        logits = []
        for start in range(0, count, size):
            stop = min(start + size, count)
            span = Span(sequence, 0, stop - start, mask[start:stop, :stop], extend=start > 0)
            rows = Rows(torch.tensor(tree.tokens[start:stop]), positions[start:stop], [span])
            logits.append(self.model.forward(rows))
            if step.number % 7 == 0:
                self.fork(step, sequence, tokens)
        assert sequence.pending == count
        self.check_tree(tree, torch.cat(logits), tokens)
        kept = tree.path(step.number % count)
        sequence.commit(kept)
        tokens += [tree.tokens[row] for row in kept]

    def lengthen(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """As `chain`, but in several passes that extend what is pending, without a mask."""
        count, size = len(step.tokens), 1 + step.number % 4
        logits = []
        for start in range(0, count, size):
            rows = Rows.of(sequence, list(step.tokens[start : start + size]), len(tokens) + start)
            rows.spans[0].extend = start > 0
            logits.append(self.model.forward(rows))
            if step.number % 5 == 0:
                sequence.reserve(step.number % 40)
        self.check(torch.cat(logits), [*tokens, *step.tokens])
        kept = step.number % (count + 1)
        sequence.commit(kept)
        tokens += step.tokens[:kept]

    def crop(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        length = step.number % (len(tokens) + 1)
        sequence.crop(length)
        del tokens[length:]

    def fork(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        self.live.append((sequence.fork(), list(tokens)))

    def release(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        sequence.release()
        self.live = [item for item in self.live if item[0] is not sequence]

    def reserve(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        sequence.reserve(step.number % 50)

    def probe(self, step: Step, sequence: SequenceCache, tokens: list[int]) -> None:
        """The next token's logits, if that were token 7."""
        logits = self.model.forward(Rows.of(sequence, [7], len(tokens)))
        self.check(logits, [*tokens, 7])
        sequence.crop(len(tokens))


def history_law(history: tuple[int, ...]) -> Tensor:
    """Logits that differ for different histories."""
    seed = hash(history) % 2**32
    return torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models(make_checkpoint: Make) -> dict[str, Model]:
    def load(architecture: str, **settings: Any) -> Model:
        checkpoint = make_checkpoint(
            architecture, hidden_size=24, intermediate_size=32, num_hidden_layers=2, **settings
        )
        return load_model(checkpoint.folder, dtype="float64", device="cpu")

    return {
        "llama": load("llama"),
        "mixed windows": load("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "oracle": OracleModel(history_law, VOCABULARY),
    }


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of four slots, so that a few tokens fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hasten.cache.cache.MINIMUM_BLOCK", 4)
        yield


def new_cache(model: Model, limit_bytes: int | None = None) -> Cache:
    return Cache(model.config.layers, model.cache_dtype, model.device, limit_bytes)


@pytest.mark.parametrize("name", ["llama", "mixed windows", "oracle"])
@settings(max_examples=max(150, settings().max_examples))
@given(program=st.lists(steps(), min_size=1, max_size=14))
def test_any_program_gives_the_logits_of_a_fresh_prefill(
    name: str, models: dict[str, Model], program: list[Step]
) -> None:
    Machine(models[name], new_cache(models[name])).run(program)


@pytest.mark.parametrize("name", ["llama", "mixed windows", "oracle"])
@pytest.mark.parametrize(
    "program",
    [
        # An empty reserved block that is forked, and then outgrown by its writer.
        [Step("reserve", 0, 3), Step("fork", 0), Step("chain", 0, 1, tuple(range(30)))],
        # A parent that crops below the fork and rewrites, in both orders.
        [
            Step("chain", 0, 1, tuple(range(12))),
            Step("fork", 0),
            Step("crop", 0, 5),
            Step("chain", 0, 1, (90, 91, 92)),
            Step("chain", 1, 1, (80, 81)),
            Step("chain", 0, 1, (70,)),
        ],
        [
            Step("chain", 0, 1, tuple(range(12))),
            Step("fork", 0),
            Step("chain", 1, 1, (80, 81)),
            Step("crop", 1, 3),
            Step("chain", 1, 1, (60, 61)),
            Step("chain", 0, 1, (70,)),
        ],
        # A child that outlives its parent and takes over the block.
        [
            Step("chain", 0, 1, tuple(range(9))),
            Step("fork", 0),
            Step("fork", 1),
            Step("chain", 0, 1, (50, 51, 52)),
            Step("release", 0),
            Step("chain", 0, 1, (40, 41)),
            Step("release", 0),
            Step("chain", 0, 1, (30, 31, 32)),
        ],
        # A cropped fork in the middle of a chain of blocks.
        [
            Step("chain", 0, 1, tuple(range(6))),
            Step("fork", 0),
            Step("chain", 1, 1, tuple(range(20, 30))),
            Step("fork", 1),
            Step("crop", 1, 6),
            Step("chain", 1, 1, (50, 51)),
            Step("chain", 0, 1, (60,)),
            Step("crop", 2, 7),
            Step("chain", 2, 1, (61, 62)),
        ],
        # A child back at the fork: the room behind it is still its parent's.
        [
            Step("chain", 0, 1, tuple(range(5))),
            Step("chain", 0, 1, (5,)),
            Step("fork", 0),
            Step("chain", 1, 1, (20, 21, 22)),
            Step("crop", 1, 6),
            Step("chain", 1, 1, (30, 31)),
            Step("chain", 0, 1, (40, 41)),
        ],
        # Everything cropped away, and a fork of nothing.
        [
            Step("chain", 0, 1, tuple(range(6))),
            Step("fork", 0),
            Step("crop", 0, 0),
            Step("fork", 0),
            Step("chain", 0, 1, (3, 4)),
            Step("chain", 2, 1, (5,)),
        ],
    ],
)
def test_programs_that_need_care(name: str, program: list[Step], models: dict[str, Model]) -> None:
    Machine(models[name], new_cache(models[name])).run(program)


def test_a_long_text_with_blocks_of_the_real_size(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.cache.cache.MINIMUM_BLOCK", 64)
    for model in models.values():
        text = tuple(torch.randint(0, VOCABULARY, (60,)).tolist())
        program = [Step("chain", 0, 1, text), Step("chain", 0, 1, text), Step("fork", 0)]
        program += [Step("chain", 1, 1, text[:30]), Step("crop", 0, 90), Step("chain", 0, 1, text)]
        Machine(model, new_cache(model)).run(program)


# Inference mode


@pytest.mark.parametrize("created_inside", [False, True])
@pytest.mark.parametrize("used_inside", [False, True])
def test_blocks_may_be_made_and_changed_in_and_out_of_inference_mode(
    created_inside: bool, used_inside: bool, models: dict[str, Model]
) -> None:
    model = models["mixed windows"]
    sequence = new_cache(model).sequence()
    tree = Tree([1, 2, 3, 4], [-1, 0, 0, 2])
    with torch.inference_mode(created_inside):
        sequence.reserve(3)
        sequence.begin(torch.arange(3))
        sequence.write(0, torch.zeros(2, 3, 6), torch.zeros(2, 3, 6))
    with torch.inference_mode(used_inside):
        model.forward(rows_of(tree, sequence))
        sequence.commit([0, 2, 3])
        child = sequence.fork()
        model.forward(Rows.of(sequence, list(range(20)), 3))
        sequence.commit(20)
        child.begin(torch.arange(3, 5))
        child.write(0, torch.zeros(2, 2, 6), torch.zeros(2, 2, 6))
        child.commit([1])
        sequence.crop(2)
        sequence.release()
        child.release()


# Transactions


def chain(model: Model, sequence: SequenceCache, count: int) -> None:
    model.forward(Rows.of(sequence, list(range(count)), sequence.length))


def test_what_is_withdrawn_was_never_there(models: dict[str, Model]) -> None:
    """Rows behind it stand where it stood, and see what is left."""
    model, logits = models["llama"], []
    for more in (0, 3):
        sequence = new_cache(model).sequence()
        rows = Rows.of(sequence, list(range(4 + more)), 0)
        model.forward(rows)
        sequence.withdraw(more)
        rows = Rows.of(sequence, [7, 8], 4)
        rows.spans[0].extend = True
        logits.append(model.forward(rows))
        assert sequence.pending == 6
        sequence.commit(6)
        logits.append(model.forward(Rows.of(sequence, [9], 6)))
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])
    with pytest.raises(ValueError, match="cannot withdraw 2 of 1 pending"):
        sequence.withdraw(2)


@pytest.mark.parametrize("kept", [-1, 5, [4], [-1], [0, 0], [1, 0], [0, 2, 1], [-1, 0], [0, 1, 2, 3, 4]])
def test_commit_refuses_rows_that_are_not_pending(kept: int | list[int], models: dict[str, Model]) -> None:
    model = models["llama"]
    sequence = new_cache(model).sequence()
    chain(model, sequence, 4)
    with pytest.raises(ValueError):
        sequence.commit(kept)
    assert (sequence.pending, sequence.length) == (4, 0)
    sequence.commit([0, 1, 2, 3])
    assert (sequence.pending, sequence.length) == (0, 4)
    with pytest.raises(ValueError):
        sequence.commit(1)


def test_commit_of_nothing_is_fine_before_the_first_row(models: dict[str, Model]) -> None:
    sequence = new_cache(models["llama"]).sequence()
    sequence.commit(0)
    sequence.commit([])
    sequence.crop(0)
    assert sequence.length == 0


@pytest.mark.parametrize("length", [-1, 5])
def test_crop_refuses_what_is_not_committed(length: int, models: dict[str, Model]) -> None:
    model = models["llama"]
    sequence = new_cache(model).sequence()
    chain(model, sequence, 6)
    sequence.commit(4)
    with pytest.raises(ValueError, match=f"cannot crop 4 slots to {length}"):
        sequence.crop(length)


def test_crop_drops_pending_rows(models: dict[str, Model]) -> None:
    model = models["llama"]
    sequence = new_cache(model).sequence()
    chain(model, sequence, 3)
    sequence.crop(0)
    assert sequence.pending == 0
    with pytest.raises(ValueError):
        sequence.commit(1)


def test_a_released_sequence_is_refused(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache = new_cache(model)
    sequence = cache.sequence()
    chain(model, sequence, 3)
    sequence.release()
    sequence.release()
    for use in (
        lambda: chain(model, sequence, 1),
        lambda: sequence.commit(0),
        lambda: sequence.reserve(10),
        sequence.fork,
    ):
        with pytest.raises(RuntimeError, match="released"):
            use()
    assert cache.used_bytes == 0


def test_a_fork_shares_memory(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache = new_cache(model)
    sequence = cache.sequence()
    chain(model, sequence, 16)
    sequence.commit(16)
    before = cache.used_bytes
    children = [sequence.fork() for _ in range(5)]
    assert cache.used_bytes == before
    for child in children:
        child.release()
    assert cache.used_bytes == before


def test_a_sole_owner_overwrites_what_was_shared(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache = new_cache(model)
    sequence = cache.sequence()
    chain(model, sequence, 8)
    sequence.commit(8)
    before = cache.used_bytes
    sequence.fork().release()
    sequence.crop(3)
    chain(model, sequence, 5)
    assert cache.used_bytes == before


def test_reserved_slots_are_not_moved(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache = new_cache(model)
    sequence = cache.sequence()
    sequence.reserve(100)
    before = cache.used_bytes
    for _ in range(25):
        chain(model, sequence, 4)
        sequence.commit(4)
    assert cache.used_bytes == cache.peak_bytes == before


def test_appending_copies_rarely(models: dict[str, Model]) -> None:
    """Blocks double, so the copies of n appended rows are less than n rows."""
    model = models["oracle"]
    cache = new_cache(model)
    sequence = cache.sequence()
    blocks = set()
    for _ in range(200):
        chain(model, sequence, 1)
        sequence.commit(1)
        blocks.add((sequence.memory(0) or [])[-1][0].capacity)
    assert sorted(blocks) == [4, 8, 16, 32, 64, 128, 256]


def test_rows_of_several_passes_are_kept_or_dropped_together(models: dict[str, Model]) -> None:
    model = models["oracle"]
    sequence = new_cache(model).sequence()
    for count in (2, 3):
        rows = Rows.of(sequence, [5] * count, sequence.pending)
        rows.spans[0].extend = True
        model.forward(rows)
    assert (sequence.length, sequence.pending) == (0, 5)
    chain(model, sequence, 1)
    assert sequence.pending == 1
    sequence.commit(1)
    assert (sequence.length, sequence.pending) == (1, 0)


# The limit


def block_bytes(model: Model, slots: int) -> int:
    return sum(Block.bytes_for(group, slots, model.cache_dtype) for group in by_shape(model.config.layers))


def test_a_full_cache_says_so_and_stays_usable(models: dict[str, Model]) -> None:
    model = models["mixed windows"]
    cache = new_cache(model, limit_bytes=block_bytes(model, 20))
    first, second = cache.sequence(), cache.sequence()
    chain(model, first, 8)
    first.commit(8)
    chain(model, second, 8)
    with pytest.raises(UserError, match=r"the KV cache is full: .* bytes wanted, .* allowed"):
        chain(model, first, 8)
    assert (first.length, first.pending) == (8, 0)
    with pytest.raises(ValueError):
        first.commit(1)
    assert cache.used_bytes == 2 * block_bytes(model, 8)
    machine = Machine(model, cache, [(first, list(range(8)))])
    second.crop(0)
    second.release()
    machine.run([Step("tree", 0, 1, (1,)), Step("chain", 0, 1, (3, 4))])
    assert cache.used_bytes == 0
    assert cache.peak_bytes <= block_bytes(model, 20)


def test_a_block_that_cannot_double_grows_by_what_is_needed(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache = new_cache(model, limit_bytes=block_bytes(model, 16 + 25))
    machine = Machine(model, cache)
    machine.run([Step("chain", 0, 1, tuple(range(16))), Step("chain", 0, 1, (1, 2, 3, 4))])


def test_a_request_beyond_all_memory_is_refused_before_it_is_tried(models: dict[str, Model]) -> None:
    cache = new_cache(models["llama"], limit_bytes=2**20)
    with pytest.raises(UserError, match="the KV cache is full"):
        cache.sequence().reserve(2**50)
    assert cache.used_bytes == 0


# Recurrent layers

RECURRENT = LayerConfig(heads=2, ffn=8, keeps=State(((1,), (2,))))
ATTENTION = LayerConfig.attention(heads=2, kv_heads=2, head_dim=4, ffn=8)


def follow(state: tuple[torch.Tensor, ...] | None, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A state that tells the whole way: each position is another digit of it, and a second tensor counts them."""
    way, count = state or (torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    return way * 20 + inputs[0] + 1, count + 1


def told(positions: Sequence[int]) -> tuple[float, int]:
    """The state behind rows at these positions."""
    way = 0.0
    for position in positions:
        way = way * 20 + position + 1
    return way, len(positions)


@pytest.fixture(params=["per row", "replay"])
def recurrent(request: pytest.FixtureRequest) -> SequenceCache:
    """Eight rows in an attention layer, and behind them in a recurrent one."""
    sequence = Cache([ATTENTION, RECURRENT], torch.float32, torch.device("cpu")).sequence()
    sequence.replays = request.param == "replay"  # type: ignore[attr-defined]
    advance(sequence, 8)
    sequence.commit(8)
    return sequence


def advance(sequence: SequenceCache, count: int, parents: Sequence[int] | None = None, extend: bool = False) -> None:
    """What a forward pass does to the cache."""
    earlier = sequence.pending if extend else 0
    above = list(parents if parents is not None else range(earlier - 1, earlier + count - 1))
    positions = torch.arange(sequence.length + earlier, sequence.length + earlier + count)
    sequence.begin(positions, extend)
    slots = positions.float().reshape(1, -1, 1).expand(2, -1, 4)
    sequence.write(0, slots, slots)
    before, left = sequence.state(1), sequence.pending_states(1)
    inputs = (positions.double().unsqueeze(1),)
    if getattr(sequence, "replays", False):
        fresh = Replay(inputs, above, follow)
        sequence.leave(1, fresh if left is None else left.extended(fresh))
        return
    states: list[tuple[torch.Tensor, ...]] = []
    for row, parent in enumerate(above):
        came = before if parent < 0 else left.at(before, parent) if parent < earlier else states[parent - earlier]
        states.append(follow(came, (inputs[0][row],)))
    per_row = StatePerRow(tuple(torch.stack(each) for each in zip(*states, strict=True)))
    sequence.leave(1, per_row if left is None else left.extended(per_row))


def state(sequence: SequenceCache) -> tuple[float, int]:
    way, count = sequence.states[1]
    assert count[0] == count[1]
    return way.item(), int(count[0])


def stored(sequence: SequenceCache) -> list[float]:
    """The positions that attention sees, as its keys say."""
    return torch.cat([part.keys[0, :, 0] for part in sequence.groups[0].parts(0, None)]).tolist()


def test_recurrent_layers_take_no_slots(recurrent: SequenceCache) -> None:
    assert recurrent.layout.group_of == (0, -1)


def block_bytes_of(slots: int) -> int:
    """Of the attention layer beside a recurrent one."""
    return Block.bytes_for(by_shape([ATTENTION])[0], slots, torch.float32)


def test_states_count_before_there_are_any() -> None:
    """What is refused is refused before the pass: a step must not find that its states do not fit."""
    layers, cpu = [ATTENTION, RECURRENT], torch.device("cpu")
    roomy = Cache(layers, torch.float32, cpu)
    assert roomy.state_bytes == 3 * 4
    sequence = roomy.sequence()
    sequence.reserve(10)
    assert roomy.used_bytes == sequence.nbytes() == roomy.sequence_bytes(10) == roomy.state_bytes + block_bytes_of(10)
    child = sequence.fork()
    advance(child, 2)
    assert roomy.used_bytes == 2 * roomy.state_bytes + block_bytes_of(10) + block_bytes_of(4)
    for each in (sequence, child):
        each.release()
    assert roomy.used_bytes == 0
    tight = Cache(layers, torch.float32, cpu, limit_bytes=roomy.state_bytes - 1)
    with pytest.raises(UserError, match="the KV cache is full: 12 bytes wanted, 11 allowed"):
        advance(tight.sequence(), 1)
    assert tight.used_bytes == 0


@pytest.mark.parametrize("kept", [0, 2, 3, [0, 1], [], [0, 1, 2]])
def test_recurrent_layers_keep_part_of_a_chain(kept: int | list[int], recurrent: SequenceCache) -> None:
    advance(recurrent, 3)
    recurrent.commit(kept)
    length = 8 + (kept if isinstance(kept, int) else len(kept))
    assert recurrent.length == length
    assert state(recurrent) == told(range(length))


@pytest.mark.parametrize("kept", [[0], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 5]])
@pytest.mark.parametrize("passes", [1, 2])
def test_recurrent_layers_keep_a_path_of_a_tree(kept: list[int], passes: int, recurrent: SequenceCache) -> None:
    """The root, its children 1 and 2, and theirs; in one pass, or grown in a second one."""
    parents = [-1, 0, 0, 1, 2, 2]
    if passes == 1:
        advance(recurrent, 6, parents)
    else:
        advance(recurrent, 3, parents[:3])
        advance(recurrent, 3, parents[3:], extend=True)
    recurrent.commit(kept)
    assert state(recurrent) == told([*range(8), *(8 + row for row in kept)])


def test_recurrent_layers_forget_pending_rows(recurrent: SequenceCache) -> None:
    advance(recurrent, 2)
    advance(recurrent, 1)
    child, snapshot = recurrent.fork(), recurrent.snapshot()
    recurrent.commit(1)
    assert state(recurrent) == told(range(9))
    for other in (child, recurrent):
        if other is recurrent:
            other.restore(snapshot)
        assert (other.length, state(other)) == (8, told(range(8)))


def test_recurrent_layers_go_back_within_the_latest_commit(recurrent: SequenceCache) -> None:
    advance(recurrent, 5, [-1, 0, 0, 2, 3])
    recurrent.commit([0, 2, 3, 4])
    way = [*range(8), 8, 10, 11, 12]
    for length in (12, 11, 9, 8):
        recurrent.crop(length)
        assert (recurrent.length, state(recurrent)) == (length, told(way[:length]))
    with pytest.raises(RollbackError, match="cannot crop 8 slots to 7: layer 1 is recurrent"):
        recurrent.crop(7)
    advance(recurrent, 2)
    recurrent.commit(2)
    assert state(recurrent) == told(range(10))
    recurrent.crop(8)
    assert state(recurrent) == told(range(8))


def test_snapshot_and_restore(recurrent: SequenceCache) -> None:
    snapshot = recurrent.snapshot()
    advance(recurrent, 3)
    recurrent.commit(3)
    advance(recurrent, 2)
    for _ in range(2):
        recurrent.restore(snapshot)
        assert (recurrent.length, recurrent.pending) == (8, 0)
        assert state(recurrent) == told(range(8))
        advance(recurrent, 1)
        assert stored(recurrent) == list(range(9))
        recurrent.commit(1)
        assert state(recurrent) == told(range(9))
    recurrent.restore(snapshot)
    with pytest.raises(ValueError, match="the snapshot has 11 slots, the sequence only 8"):
        advance(recurrent, 3)
        recurrent.commit(3)
        longer = recurrent.snapshot()
        recurrent.restore(snapshot)
        recurrent.restore(longer)


def test_a_fork_has_states_of_its_own(recurrent: SequenceCache) -> None:
    child = recurrent.fork()
    advance(child, 2)
    child.commit(2)
    assert state(recurrent) == told(range(8))
    advance(recurrent, 1)
    assert stored(recurrent) == list(range(9))
    recurrent.commit(1)
    assert (state(recurrent), state(child)) == (told(range(9)), told(range(10)))


@pytest.mark.parametrize(
    "mask, parents",
    [
        (None, [1, 2, 3]),
        ([[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], [1, 0, 3]),
        ([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 1]], [-1, -1, 1]),
    ],
)
def test_which_row_a_row_follows(mask: list[list[int]] | None, parents: list[int], recurrent: SequenceCache) -> None:
    """Three rows behind two that are pending already."""
    span = Span(recurrent, 4, 7, None if mask is None else torch.tensor(mask, dtype=torch.bool), extend=True)
    assert span.parents(5) == parents
    with pytest.raises(ValueError, match="a recurrent layer needs rows in order"):
        Span(recurrent, 4, 7, "all").parents(3)


def test_snapshots_are_free_for_layers_that_can_be_cropped(models: dict[str, Model]) -> None:
    model = models["llama"]
    sequence = new_cache(model).sequence()
    chain(model, sequence, 6)
    sequence.commit(6)
    snapshot = sequence.snapshot()
    assert snapshot.states == {}
    chain(model, sequence, 3)
    sequence.commit(2)
    sequence.restore(snapshot)
    assert sequence.length == 6


# Blocks


def test_layers_of_one_shape_share_a_block() -> None:
    wide = LayerConfig(heads=4, ffn=8, keeps=Slots(heads=1, key_width=8, value_width=6))
    reader = LayerConfig(heads=4, ffn=8, keeps=SlotsOf(2))
    idle = LayerConfig(heads=1, ffn=8, keeps=None)
    layers = [ATTENTION, RECURRENT, wide, ATTENTION, reader, idle]
    layout = Layout(layers, by_shape(layers))
    assert [(group.layers, group.slots) for group in layout.groups] == [
        ((0, 3), Slots(2, 4, 4)),
        ((2,), Slots(1, 8, 6)),
    ]
    assert (layout.group_of, layout.index_of) == ((0, -1, 1, 0, 1, -1), (0, -1, 0, 1, 0, -1))
    blocks = [Block(group, 5, torch.float32, torch.device("cpu")) for group in layout.groups]
    assert [(tuple(block.keys.shape), tuple(block.values.shape)) for block in blocks] == [
        ((2, 2, 5, 4), (2, 2, 5, 4)),
        ((1, 1, 5, 8), (1, 1, 5, 6)),
    ]
    for block, group in zip(blocks, layout.groups, strict=True):
        assert block.values.data_ptr() == block.keys.data_ptr() + block.keys.nbytes
        assert block.nbytes() == Block.bytes_for(group, 5, torch.float32)


def test_a_layer_reads_slots_that_are_there() -> None:
    reader = LayerConfig(heads=4, ffn=8, keeps=SlotsOf(1))
    for layers in ([reader, ATTENTION], [ATTENTION, RECURRENT, reader]):
        with pytest.raises(UserError, match="reads the slots of layer 1, which has none by then"):
            Layout(layers, by_shape(layers))


def test_slots_move_in_all_layers_and_with_their_positions() -> None:
    group = by_shape([ATTENTION, ATTENTION])[0]
    block, other = (Block(group, 10, torch.float32, torch.device("cpu")) for _ in range(2))
    numbers = torch.arange(10)
    for slots in (block.keys, block.values):
        slots.copy_(numbers.reshape(1, 1, 10, 1).expand_as(slots))
    block.positions.copy_(numbers)
    other.take(block, [1, 2, 5], 4)
    block.take(block, [4, 5, 8], 3)
    for each, expected in ((block, [0, 1, 2, 4, 5, 8]), (other, [1, 2, 5])):
        start = 0 if each is block else 4
        stop = start + len(expected)
        assert each.positions[start:stop].tolist() == expected
        for layer in (0, 1):
            for slots in (each.keys[layer], each.values[layer]):
                assert slots[1, start:stop, 2].tolist() == expected


def test_the_parts_of_a_windowed_layer_skip_what_no_row_sees(models: dict[str, Model]) -> None:
    model = models["mixed windows"]
    sequence = new_cache(model).sequence()
    chain(model, sequence, 40)
    sequence.commit(40)
    sequence.begin(torch.arange(40, 42))
    group = sequence.groups[0]
    full, windowed = group.parts(0, None), group.parts(1, None, 6)
    assert [part.keys.shape[1] for part in full] == [40, 2]
    # Window 6: row 40 sees 35..40 and row 41 sees 36..41, so slot 35 is the edge.
    assert [part.keys.shape[1] for part in windowed] == [2, 1, 4]
    assert [part.blind is None or part.blind.tolist() for part in windowed] == [True, [False, True], True]
    assert all(one.block is not other.block for one, other in pairwise(group._views))


# Eviction


def contents(sequence: SequenceCache) -> list[tuple[int, float]]:
    """Position and key of every committed slot."""
    return [
        (int(block.positions[slot]), float(block.keys[0, 0, slot, 0]))
        for block, length in sequence.memory(0) or []
        for slot in range(length)
    ]


def append(sequence: SequenceCache, slots: list[tuple[int, float]], kept: list[int]) -> None:
    """A pass of rows at these positions, with these keys."""
    keys = torch.tensor([[key] for _, key in slots])[None]
    sequence.begin(torch.tensor([position for position, _ in slots]))
    sequence.write(0, keys, -keys)
    sequence.commit(kept)


def test_any_evictions_are_those_of_a_list(models: dict[str, Model]) -> None:
    """Commits, evictions and crops in any order; values go with their keys."""
    rng = random.Random(0)
    for _ in range(60):
        sequence = new_cache(models["oracle"]).sequence()
        expected: list[tuple[int, float]] = []
        for _ in range(12):
            kind = rng.choice(["commit", "commit", "evict", "evict", "crop"])
            if kind == "commit":
                slots = [(rng.randrange(100), rng.random()) for _ in range(rng.randint(1, 6))]
                slots = [(position, float(torch.tensor(key))) for position, key in slots]
                kept = sorted(rng.sample(range(len(slots)), rng.randint(0, len(slots))))
                append(sequence, slots, kept)
                expected += [slots[row] for row in kept]
            elif kind == "evict":
                gone = sorted(rng.sample(range(len(expected)), rng.randint(0, len(expected))))
                if rng.random() < 0.3 and gone:
                    # Pending rows vanish with it.
                    sequence.begin(torch.arange(3))
                sequence.evict(gone)
                expected = [slot for number, slot in enumerate(expected) if number not in gone]
            else:
                length = rng.randint(0, len(expected))
                sequence.crop(length)
                del expected[length:]
            assert contents(sequence) == expected
            assert sequence.length == len(expected)
            for block, length in sequence.memory(0) or []:
                assert torch.equal(block.values[0, :, :length], -block.keys[0, :, :length])
        sequence.release()


def filled(model: Model, count: int) -> SequenceCache:
    sequence = new_cache(model).sequence()
    append(sequence, [(position, 10.0 + position) for position in range(count)], list(range(count)))
    return sequence


def test_evicting_nothing_leaves_pending_rows(models: dict[str, Model]) -> None:
    sequence = filled(models["oracle"], 6)
    before = contents(sequence)
    sequence.begin(torch.arange(2))
    sequence.evict([])
    assert (sequence.pending, contents(sequence)) == (2, before)


@pytest.mark.parametrize("slots", [[6], [-1], [2, 2], [3, 1], range(4, 7)])
def test_evict_refuses_slots_that_are_not_there(slots: list[int], models: dict[str, Model]) -> None:
    sequence = filled(models["oracle"], 6)
    with pytest.raises(ValueError, match="not ascending numbers below 6"):
        sequence.evict(slots)
    assert sequence.length == 6


def test_what_another_sequence_reads_stays_as_it_is(models: dict[str, Model]) -> None:
    """Who evicts it has a copy of the rest from then on."""
    sequence = filled(models["oracle"], 6)
    before = contents(sequence)
    child = sequence.fork()
    for each in (sequence, child):
        append(each, [(6, 1.0), (7, 2.0), (8, 3.0)], [0, 1, 2])
        # What each has of its own goes in place.
        each.evict([6, 8])
        assert contents(each) == [*before, (7, 2.0)]
    child.evict([1, 2, 6])
    assert contents(child) == [before[0], *before[3:]]
    assert contents(sequence) == [*before, (7, 2.0)]
    append(child, [(9, 4.0)], [0])
    sequence.evict(range(7))
    assert (contents(sequence), contents(child)) == ([], [before[0], *before[3:], (9, 4.0)])
    for each in (sequence, child):
        each.release()
    assert sequence._cache.used_bytes == 0  # type: ignore[attr-defined]


def test_a_recurrent_layer_cannot_evict() -> None:
    layers = (
        LayerConfig.attention(heads=1, kv_heads=1, head_dim=1, ffn=0),
        LayerConfig(heads=1, ffn=0, keeps=State(((1,),))),
    )
    sequence = Cache(layers, torch.float32, torch.device("cpu")).sequence()
    append(sequence, [(0, 1.0), (1, 2.0)], [0, 1])
    with pytest.raises(RollbackError, match="evict 1 slots"):
        sequence.evict([0])
