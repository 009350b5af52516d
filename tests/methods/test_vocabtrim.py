"""VocabTrim: which rows are kept, that the trimmed head is exact, and that the target's law is untouched."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_draft_model import PROMPTS, recorded

from conformance.laws import Law, by_engine, check_law, joint
from hasten import LLM, SamplingParams, UserError
from hasten.engine import ROOT, Draft, Engine, Observation, Target
from hasten.engine.registry import parse
from hasten.engine.sampling.grammar import Constraint
from hasten.methods.drafters.vocabtrim import VocabTrim, VocabTrimParameters, forced_tokens, most_frequent
from hasten.model import OracleModel, Rows, load_model
from hasten.model.linear import fastest_linear
from helpers import END, START, VOCABULARY, same

CALIBRATION = "the cat and the moon sing in the garden; XYZ (48) [15] {62} !?"


@pytest.fixture
def words(tmp_path):
    """A calibration file."""
    path = tmp_path / "words.txt"
    path.write_text(CALIBRATION + "\n\n" + CALIBRATION + "\n")
    return path


def made(llm: LLM, **parameters) -> VocabTrim:
    return VocabTrim(Target(llm.model, llm.tokenizer, str(llm.folder)), VocabTrimParameters(**parameters))


class OracleVocabTrim(VocabTrim):
    """The real method with a language in the small model's place, and given counts."""

    def __init__(self, target, parameters, law, counts):
        self.law, self.counts = law, counts
        super().__init__(target, parameters)

    def _load(self, target, parameters):
        return OracleModel(self.law, self.law.size)

    def _count(self, target, parameters):
        return self.counts

    def _trim(self, model):
        return OracleModel(lambda history: self.law(history)[self.kept.tokens], len(self.kept.tokens))


def vocabtrim(law: Law, kept: list[int], **parameters):
    """From an engine to its drafter, which keeps these tokens."""
    return lambda engine: OracleVocabTrim(
        engine.target, VocabTrimParameters(tokens=len(kept), **parameters), law, Counter(kept)
    )


# What is kept


def test_most_frequent():
    counts = Counter({7: 5, 2: 5, 9: 6, 4: 1})
    assert most_frequent(counts, 3, 10) == [9, 2, 7]
    # Equal counts, and tokens that never occurred, in the order of ids.
    assert most_frequent(counts, 7, 10) == [9, 2, 7, 4, 0, 1, 3]
    # Ids beyond the vocabulary (padding) are never kept.
    assert most_frequent(Counter({12: 99}), 4, 10) == [0, 1, 2, 3]
    assert most_frequent(counts, 99, 10) == [9, 2, 7, 4, 0, 1, 3, 5, 6, 8]


def test_forced_tokens(llm):
    forced = forced_tokens(llm.tokenizer)
    assert {START, END} <= forced
    assert {llm.tokenizer.encode(digit)[0] for digit in "0123456789 \n"} <= forced
    assert len(forced) == 14
    assert forced_tokens(None) == set()
    bytes_too = SimpleNamespace(
        get_vocab=lambda: {"<0x0A>": 13, "<0xFF>": 258, "a": 300, "0": 301},
        get_added_vocab=lambda: {"<|user|>": 310},
        all_special_ids=[2],
        encode=lambda text, add_special_tokens: [301],
    )
    assert forced_tokens(bytes_too) == {2, 13, 258, 301, 310}


def test_counts_of_a_file(llm, words, tmp_path):
    drafter = made(llm, tokens=5, calibration=str(words), forced=False)
    ids = llm.tokenizer.encode(CALIBRATION + "\n") * 2
    assert drafter.kept.tokens.tolist() == sorted(most_frequent(Counter(ids), 5, VOCABULARY))
    assert drafter.coverage == sum(id_ in drafter.kept.number_of for id_ in ids) / len(ids)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "cat", "answer": "zz"}) + "\n")
    drafter = made(llm, tokens=3, calibration=str(lines), forced=False)
    assert llm.tokenizer.encode("z")[0] in drafter.kept.number_of
    assert made(llm, tokens=3, calibration=str(lines)).kept.number_of.keys() >= {START, END}


def test_built_in_text(llm):
    drafter = made(llm)
    assert len(drafter.kept.tokens) >= VOCABULARY // 4
    assert 0.3 < drafter.coverage < 1
    # What is kept says more of the text than as many tokens at random.
    assert drafter.coverage > len(drafter.kept.tokens) / VOCABULARY


def test_text_of_the_target(llm, words):
    """Counts of what the target says: a token it never says is not among them."""
    plain, own = (
        made(llm, tokens=9, calibration=str(words), source=source, forced=False) for source in ("text", "target")
    )
    assert plain.kept.tokens.tolist() != own.kept.tokens.tolist()
    assert (
        own.kept.tokens.tolist()
        == made(llm, tokens=9, calibration=str(words), source="target", forced=False).kept.tokens.tolist()
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no text"),
        ("nonsense", "line 1: not JSON"),
        ('\n{"text": 3}', "line 2: every line needs a string under 'prompt'"),
        ("[]", "line 1: every line needs"),
    ],
)
def test_bad_calibration_files(llm, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        made(llm, calibration=str(path))
    with pytest.raises(UserError, match=r"vocabtrim cannot read calibration text from .*nowhere"):
        made(llm, calibration=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "spec, message",
    [("tokens=-1", "tokens must be 0"), ("source=web", "source must be"), ("length=33", "length must be between")],
)
def test_bad_parameters(spec, message):
    with pytest.raises(UserError, match=f"^vocabtrim: {message}"):
        parse(f"vocabtrim:{spec}")


def test_targets_that_cannot_be_served(llm):
    with pytest.raises(UserError, match="vocabtrim needs a model: use vocabtrim:model=FOLDER"):
        VocabTrim(Target(llm.model, llm.tokenizer), VocabTrimParameters())
    with pytest.raises(UserError, match="has no tokenizer"):
        VocabTrim(Target(llm.model, None, str(llm.folder)), VocabTrimParameters())


# The head


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("tokens", [1, 16, 60, VOCABULARY])
def test_trimmed_head_is_rows_of_the_full_one(llm, tiny, words, dtype, tolerance, tokens):
    drafter = made(llm, tokens=tokens, calibration=str(words), forced=False, dtype=dtype)
    full = load_model(f"{tiny}-draft", dtype=dtype, device="cpu")
    kept = drafter.kept.tokens.tolist()
    assert len(kept) == tokens == drafter.model.head.out_features
    assert kept == sorted(kept)
    assert {row: token for token, row in drafter.kept.number_of.items()} == dict(enumerate(kept))
    hidden = torch.randn(7, full.config.hidden_size, dtype=full.dtype)
    torch.testing.assert_close(
        drafter.model.head.forward(hidden), full.head.forward(hidden)[:, kept], atol=tolerance, rtol=0
    )
    # A whole pass, over tokens that are not kept, too: the embedding is complete.
    every = list(range(VOCABULARY))
    one, other = drafter.cache.sequence(), drafter.cache.sequence()
    trimmed = drafter.model.forward(Rows.of(one, every, 0))
    torch.testing.assert_close(trimmed, full.forward(Rows.of(other, every, 0))[:, kept], atol=1e-5, rtol=1e-5)


def test_head_with_a_bias(llm, words):
    drafter = made(llm, tokens=20, calibration=str(words), forced=False)
    full = load_model(f"{llm.folder}-draft", device="cpu")
    full.head = fastest_linear(full.head.dequant(), torch.linspace(-3, 3, VOCABULARY))
    trimmed = drafter._trim(full)
    hidden = torch.randn(3, full.config.hidden_size)
    expected = full.head.forward(hidden)[:, drafter.kept.tokens]
    torch.testing.assert_close(trimmed.head.forward(hidden), expected, atol=1e-5, rtol=1e-5)


# Exactness


@pytest.mark.parametrize("tokens, forced", [(16, False), (60, True), (VOCABULARY, False)])
def test_output_is_plain_decodings(llm, words, tokens, forced):
    spec = f"vocabtrim:tokens={tokens},forced={forced},calibration={words},confidence=0"
    drafter = llm.engine.drafter(spec)[1]
    assert (END in drafter.kept.number_of) == (tokens > 16)
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "logit_bias": {5: 3.0, 40: 2.0, 149: -9.0}}
    for settings in ({}, {"temperature": 0.8}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, **penalties}, penalties):
        asked = [SamplingParams(max_tokens=24, seed=number, **settings) for number in range(len(PROMPTS))]
        expected = llm.generate(PROMPTS, asked, "plain")
        got = llm.generate(PROMPTS, asked, spec)
        for mine, theirs in zip(got, expected, strict=True):
            same(mine.choices[0], theirs.choices[0])
        assert sum(each.choices[0].statistics.accepted for each in got) > 5
    assert drafter.cache.used_bytes == 0
    assert drafter.kept._samplers == drafter._proposed == {}


@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.9, "match")])
@pytest.mark.parametrize("shape", ["width=1,confidence=0.2", "width=3,length=3"])
def test_everything_kept_is_the_draft_model(llm, words, temperature, acceptance, shape):
    settings = {"temperature": temperature, "acceptance": acceptance, "frequency_penalty": 0.4}
    mine, outputs, _ = recorded(llm, f"vocabtrim:tokens={VOCABULARY},calibration={words},{shape}", **settings)
    theirs, expected, _ = recorded(llm, f"draft-model:{shape}", **settings)
    assert outputs == expected
    for prompt in theirs:
        assert [(each.tokens, each.parents) for each in mine[prompt]] == [
            (each.tokens, each.parents) for each in theirs[prompt]
        ]


def test_drafts_stay_inside(llm, words):
    spec = f"vocabtrim:tokens=16,forced=false,calibration={words},confidence=0,width=2,length=3"
    kept = set(made(llm, tokens=16, forced=False, calibration=str(words)).kept.number_of)
    for settings in ({}, {"temperature": 0.9}, {"temperature": 0.9, "acceptance": "max"}):
        drafts, *_ = recorded(llm, spec, **settings)
        proposed = [token for own in drafts.values() for draft in own for token in draft.tokens]
        assert len(set(proposed)) > 8 and set(proposed) <= kept
        for draft in (draft for own in drafts.values() for draft in own):
            for drawn in draft.drawn.values():
                assert set(drawn.ids.tolist()) == kept
                assert float(drawn.probabilities.sum()) == pytest.approx(1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("temperature, acceptance", [(0.0, "match"), (0.9, "match"), (0.9, "max")])
def test_grammar(llm, words, width, temperature, acceptance):
    """Masked among the kept tokens; where none of them is allowed, nothing is proposed."""
    spec = f"vocabtrim:tokens=40,forced=false,calibration={words},confidence=0,width={width}"
    asked = [
        SamplingParams(
            max_tokens=20, temperature=temperature, acceptance=acceptance, seed=number, constraint=constraint
        )
        for number, constraint in enumerate([Constraint(regex="[a-m ]{21,40}"), Constraint(regex="[~`|]{21,40}")])
    ]
    got = llm.generate(PROMPTS[:2], asked, spec)
    assert got[0].choices[0].statistics.proposed > 0
    assert got[1].choices[0].statistics.proposed == 0
    assert set(got[0].text) <= set("abcdefghijklm ")
    if acceptance == "match":
        for mine, theirs in zip(got, llm.generate(PROMPTS[:2], asked, "plain"), strict=True):
            same(mine.choices[0], theirs.choices[0])


EIGHT, EIGHT_DRAFT = Law(seed=5, size=8), Law(seed=6, size=8)


@pytest.mark.parametrize("acceptance", ["match", "max"])
@pytest.mark.parametrize("shape", [{"confidence": 0.0, "length": 3}, {"width": 2, "length": 2}])
def test_law_of_the_output(acceptance, shape):
    """Three of eight tokens kept: the others come from the residual, as often as they should."""
    method = vocabtrim(EIGHT_DRAFT, [1, 4, 6], **shape)
    groups, _, accepted = by_engine(EIGHT, method, groups=6, count=80, acceptance=acceptance, temperature=0.9)
    check_law(groups, joint(EIGHT.table(0.9), skipped=1))
    assert accepted > 100


def test_trimming_that_forgets_the_rest_is_noticed():
    """The same drafts under a q that claims all tokens: the test above would see it."""

    class Wrong(OracleVocabTrim):
        def propose_all(self, requests, budgets):
            drafts = super().propose_all(requests, budgets)
            for draft in drafts:
                for drawn in draft.drawn.values():
                    object.__setattr__(drawn, "probabilities", drawn.probabilities / 3)
            return drafts

    def method(engine):
        return Wrong(
            engine.target, VocabTrimParameters(tokens=3, confidence=0, length=3), EIGHT_DRAFT, Counter([1, 4, 6])
        )

    groups, _, _ = by_engine(EIGHT, method, groups=6, count=100, acceptance="max", temperature=0.9)
    with pytest.raises(AssertionError):
        check_law(groups, joint(EIGHT.table(0.9), skipped=1))


def test_padding_is_never_kept():
    class Five(SimpleNamespace):
        def __len__(self):
            return 5

    target = Target(OracleModel(EIGHT, 8), tokenizer=Five())
    parameters = VocabTrimParameters(tokens=8, forced=False)
    assert OracleVocabTrim(target, parameters, EIGHT_DRAFT, Counter([6, 7, 2])).kept.tokens.tolist() == [0, 1, 2, 3, 4]


# Statistics


def test_rejections_are_counted():
    engine = Engine(OracleModel(EIGHT, 8))
    drafter = vocabtrim(EIGHT_DRAFT, [1, 4, 6], confidence=0.0, length=2)(engine)
    (request,) = engine.add([0, 1], SamplingParams(max_tokens=20), drafter)
    engine.step()

    def observe(
        draft: Draft, path: list[int], tokens: list[int], propose: bool = True, stale: int = 0
    ) -> tuple[int, int]:
        if propose:
            drafter.propose(request, 8)
        start = len(request.tokens) - len(tokens) - stale
        drafter._proposed[request.id] = start, {1, 4} if propose else set()
        drafter.observe(request, Observation(draft, path, tokens, torch.empty(0), {}))
        return drafter.inside, drafter.outside

    chain = Draft.chain([1, 4])
    before = drafter.inside, drafter.outside
    assert before == (0, 0)
    assert observe(chain, [], [6]) == (1, 0)
    assert observe(chain, [0], [1, 3]) == (1, 1)
    # All accepted: the token behind is no rejection. Nor is a step without a draft, or with another drafter's.
    assert observe(chain, [0, 1], [1, 4, 3]) == (1, 1)
    assert observe(Draft(), [], [3], propose=False) == (1, 1)
    assert observe(Draft([2], [ROOT]), [], [3], propose=False) == (1, 1)
    assert observe(chain, [], [6], stale=1) == (1, 1)
    engine.abort(request)


def test_rejections_of_a_whole_run():
    """Counted beside the outputs: every rejected draft is one of the two."""
    engine = Engine(OracleModel(EIGHT, 8))
    drafter = vocabtrim(EIGHT_DRAFT, [1, 4, 6], confidence=0.0, length=2)(engine)
    steps = []
    observe = drafter.observe

    def note(request, seen):
        steps.append((seen.draft, seen.path, seen.tokens))
        observe(request, seen)

    drafter.observe = note
    for seed in range(10):
        engine.add([seed % 8, 1], SamplingParams(max_tokens=30, temperature=1.0, seed=seed), drafter)
    for _ in engine.run():
        pass
    rejected = [tokens[-1] for draft, path, tokens in steps if len(path) < len(draft)]
    assert (drafter.inside, drafter.outside) == (
        sum(token in (1, 4, 6) for token in rejected),
        sum(token not in (1, 4, 6) for token in rejected),
    )
    assert min(drafter.inside, drafter.outside) > 5


def test_every_end_of_text_keeps_its_row(llm):
    drafter = Engine(llm.model, llm.tokenizer, {137, 141}, folder=str(llm.folder)).drafter("vocabtrim:tokens=1")[1]
    assert {137, 141} <= set(drafter.kept.tokens.tolist())
