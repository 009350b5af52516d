"""Constraints: masks against brute force, walks in any order, drafts cut to fit, and what a user is told."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten import LLM, Constraint, SamplingParams, UserError
from hasten.engine import ROOT, Draft, Drawn, Engine
from hasten.engine.sampling import grammar as module
from hasten.engine.sampling.grammar import Grammars, GrammarState
from hasten.engine.sampling.sampler import Sampler
from hasten.model import OracleModel
from helpers import END, START, VOCABULARY, Replay, add, make_tokenizer, same

TOKENIZER = make_tokenizer()
TEXTS = [TOKENIZER.decode([token]) for token in range(VOCABULARY)]
GRAMMARS = Grammars(TOKENIZER, VOCABULARY, {END})
WORDS = ["the", "then", "cat", "cats", "moon"]
REGEX = "(the|then|cat|cats|moon)( (and|[0-3]))?"
LANGUAGE = [word + tail for word in WORDS for tail in ("", " and", *(f" {digit}" for digit in range(4)))]
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"enum": ["cat", "moon"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "maxItems": 3,
}


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def token(text: str) -> int:
    return encode(text)[0]


def allowed(state: GrammarState, path: tuple[int, ...] = ()) -> set[int]:
    bits = state.bits(path)
    assert bits is not None
    mask = state.masks([path])[0]
    assert mask.shape == (VOCABULARY,)
    return set(mask.nonzero()[:, 0].tolist())


def fits_schema(value: object) -> bool:
    """SCHEMA, checked by hand."""
    return (
        isinstance(value, list)
        and len(value) <= 3
        and all(
            isinstance(item, dict)
            and list(item) in (["name"], ["name", "count"])
            and item["name"] in ("cat", "moon")
            and 0 <= item.get("count", 0) <= 99
            for item in value
        )
    )


# The description


def test_a_constraint_is_one_thing():
    for given_fields in ({}, {"regex": "a", "json_object": True}, {"json_schema": SCHEMA, "grammar": "start: A"}):
        with pytest.raises(UserError, match="exactly one of json_schema, regex, grammar and json_object"):
            Constraint(**given_fields)


@pytest.mark.parametrize("schema", ['{"type": ', {"type": object}, "object"])
def test_a_schema_is_json(schema):
    with pytest.raises(UserError, match="the JSON schema is not JSON"):
        Constraint(json_schema=schema)
    with pytest.raises(UserError, match="the JSON schema must be an object"):
        Constraint(json_schema="[1]")


def test_equal_constraints_are_one_key():
    assert Constraint(json_schema=SCHEMA) == Constraint(json_schema=json.dumps(SCHEMA))
    assert len({Constraint(json_schema=SCHEMA), Constraint(json_schema=json.dumps(SCHEMA)), Constraint(regex="a")}) == 2


def test_ignore_eos_contradicts_a_constraint():
    with pytest.raises(UserError, match="ignore_eos and a constraint exclude each other"):
        SamplingParams(constraint=Constraint(regex="a"), ignore_eos=True)


# Masks


def test_masks_of_a_finite_language():
    """Against the list of all its texts: behind every path, a token is allowed if some text goes on with it.

    Where only one character can follow, fewer may do: those that the tokenizer itself would take.
    """
    state = GRAMMARS.start(Constraint(regex=REGEX))
    waiting: list[tuple[int, ...]] = [()]
    seen = 0
    while waiting:
        path = waiting.pop()
        text = TOKENIZER.decode(list(path))
        expected = {
            token
            for token in range(VOCABULARY)
            if token not in (START, END) and any(each.startswith(text + TEXTS[token]) for each in LANGUAGE)
        }
        got = allowed(state, path)
        following = {(each + "$")[len(text)] for each in LANGUAGE if each.startswith(text)}
        if len(following) == 1 and expected:
            assert got and got <= expected, text
        else:
            assert got == expected | ({END} if text in LANGUAGE else set()), text
        assert (state.length(path) == len(path)) == (not expected)
        waiting += [(*path, token) for token in got - {END}]
        seen += 1
    assert seen > 50


def test_json_may_be_written_compactly_and_with_indentation():
    value = [{"name": "cat", "count": 17}, {"name": "moon"}]
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        state = GRAMMARS.start(Constraint(json_schema=SCHEMA))
        assert state.accepts(encode(text))
        assert state.length(encode(text)) == len(encode(text))
    state = GRAMMARS.start(Constraint(json_schema=SCHEMA))
    # Blanks have an end.
    assert not state.accepts(encode("[" + "\n" * 3))
    assert not state.accepts(encode("[" + " " * 40))


def test_a_schema_may_bring_its_own_options():
    state = GRAMMARS.start(Constraint(json_schema={**SCHEMA, "x-guidance": {"whitespace_flexible": False}}))
    assert state.accepts(encode('[{"name":'))
    assert not state.accepts(encode("[ "))


@pytest.mark.parametrize("seed", range(10))
def test_any_allowed_walk_gives_valid_json(seed):
    rng = random.Random(seed)
    state = GRAMMARS.start(Constraint(json_schema=SCHEMA))
    output: list[int] = []
    while True:
        choice = rng.choice(sorted(allowed(state) - {END}))
        length = state.length([choice])
        state.commit([choice])
        output.append(choice)
        if length is not None:
            break
    assert fits_schema(json.loads(TOKENIZER.decode(output)))


def test_json_object_and_grammars():
    state = GRAMMARS.start(Constraint(json_object=True))
    assert state.accepts(encode('{"moon": [1, {}]}'))
    assert not state.accepts(encode("[1"))
    for text in ('start: "(" start ")" | "cat"', 'root ::= "(" root ")" | "cat"'):
        state = GRAMMARS.start(Constraint(grammar=text))
        assert state.length(encode("((cat))")) == len(encode("((cat))"))
        assert not state.accepts(encode("((cat)))"))


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=12), st.integers(0, 3))
def test_paths_may_be_asked_in_any_order(walks, committed):
    """One matcher that is rolled back and forth says what a new one says that walks each path alone."""
    constraint = Constraint(json_schema=SCHEMA)
    one = GRAMMARS.start(constraint)
    prefix: list[int] = []

    def follow(walk: list[int]) -> tuple[int, ...]:
        """A path of the grammar: at each place the walk's choice of what is allowed; it may step aside at the end."""
        path: tuple[int, ...] = ()
        for step in walk:
            bits = alone.bits(path)
            if bits is None:
                break
            options = sorted(allowed(alone, path))
            path = (*path, options[step * 7 % len(options)])
        return (*path, walk[0] + 40) if walk and walk[0] % 3 == 2 else path

    for number, walk in enumerate(walks):
        alone = GRAMMARS.start(constraint)
        alone.commit(prefix)
        path = follow(walk)
        fresh = GRAMMARS.start(constraint)
        fresh.commit(prefix)
        assert torch.equal(one.masks([path]), fresh.masks([path]))
        assert one.accepts(path) == fresh.accepts(path)
        if number == committed and one.bits(path) is not None:
            one.commit(path)
            prefix += path


def test_everything_is_allowed_where_nothing_leads():
    """Rows behind a forbidden token, or behind the end, are never used; they are distributions all the same."""
    state = GRAMMARS.start(Constraint(regex="cat"))
    for path in (encode("x"), (*encode("cat"), END), encode("catx"), encode("cat") + encode("x")):
        assert state.masks([path]).all()
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), 0, [5], VOCABULARY, state)
    assert not sampler.distribution(torch.zeros(1, VOCABULARY), [encode("x")]).scores.isnan().any()


def test_a_vocabulary_wider_than_the_tokenizer():
    wide = Grammars(TOKENIZER, VOCABULARY + 77, {END, VOCABULARY + 5}).start(Constraint(regex="(cat)*"))
    mask = wide.masks([()])[0]
    assert mask.shape == (VOCABULARY + 77,)
    # Padding is never allowed; every end-of-text id is.
    assert set(mask[VOCABULARY:].nonzero()[:, 0].tolist()) == {5}
    assert mask[END]


def test_without_end_of_text_ids():
    state = Grammars(TOKENIZER, VOCABULARY, ()).start(Constraint(regex="(cat)*"))
    assert {TEXTS[each] for each in allowed(state)} == {"c", "ca", "cat"} & set(TEXTS)


# Drafts


def tree(*branches: tuple[str, int]) -> Draft:
    """Nodes of one token each: (text, parent)."""
    draft = Draft()
    for text, parent in branches:
        add(draft, token(text), parent)
    return draft


def test_forbidden_nodes_leave_with_what_is_below_them():
    state = GRAMMARS.start(Constraint(regex="[ab][cd]*x"))
    draft = tree(("a", ROOT), ("c", ROOT), ("c", 0), ("b", 1), ("x", 0), ("b", 0), ("d", 2), ("a", 4), ("d", 5))
    draft.estimates = [number / 10 for number in range(9)]
    fitted = state.fit(draft)
    assert fitted.tokens == [token(each) for each in "acxd"]
    assert fitted.parents == [ROOT, 0, 0, 1]
    assert fitted.estimates == [0.0, 0.2, 0.4, 0.6]
    assert state.fit(fitted) is fitted
    assert state.fit(Draft()) == Draft()
    assert state.fit(Draft.chain(encode("cat"))) == Draft()


def test_end_of_text_in_a_draft():
    state = GRAMMARS.start(Constraint(regex="a+"))
    a = token("a")
    assert state.fit(Draft.chain([a, END, a])).tokens == [a, END]
    assert state.fit(Draft.chain([END])).tokens == []
    # Where the grammar is complete the request ends without it.
    state = GRAMMARS.start(Constraint(regex="a"))
    assert state.fit(Draft.chain([a, END])).tokens == [a]


def test_sampled_children_stay():
    """The rule has to see all that were drawn, in draw order; deterministic siblings behind them may go."""
    state = GRAMMARS.start(Constraint(regex="[ab][cd]*x"))
    q = torch.full((VOCABULARY,), 1 / VOCABULARY, dtype=torch.float64)
    draft = tree(("z", ROOT), ("a", ROOT), ("z", ROOT), ("c", 0), ("c", 1), ("z", 1), ("b", ROOT))
    draft.drawn = {ROOT: Drawn(q, count=2), 0: Drawn(q)}
    fitted = state.fit(draft)
    assert fitted.tokens == [token(each) for each in "zacb"]
    assert fitted.parents == [ROOT, ROOT, 1, ROOT]
    assert fitted.drawn[ROOT] is draft.drawn[ROOT]


def test_a_tree_is_walked_once(monkeypatch: pytest.MonkeyPatch):
    """One step of the matcher per node, also when the verifier asks for the same paths again."""
    state = GRAMMARS.start(Constraint(regex="[a-f]{1,9}"))
    draft, level = Draft(), [ROOT]
    for _ in range(4):
        level = [add(draft, token(text), node) for node in level for text in "abc"]

    class Counting:
        def __init__(self, matcher) -> None:
            self.matcher, self.steps = matcher, 0

        def try_consume_tokens(self, tokens):
            self.steps += len(tokens)
            return self.matcher.try_consume_tokens(tokens)

        def __getattr__(self, name):
            return getattr(self.matcher, name)

    counting = Counting(state._matcher)
    monkeypatch.setattr(state, "_matcher", counting)
    assert state.fit(draft) is draft
    state.masks([[draft.tokens[each] for each in draft.path(node)] for node in [ROOT, *range(len(draft))]])
    assert counting.steps == len(draft) == 3 + 9 + 27 + 81


# Requests


def ask(llm: LLM, constraint: Constraint, prompt: str = "the cat", method: str = "plain", **settings):
    settings = {"max_tokens": 60, **settings}
    return llm.generate(prompt, SamplingParams(constraint=constraint, **settings), method)[0].choices


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_ends_with_the_grammar(llm, temperature):
    """Where nothing may follow, no step is spent on end-of-text, and the reason is `stop` even on the last token."""
    for seed in range(10):
        (got,) = ask(llm, Constraint(regex="(cat|moon)s"), temperature=temperature, seed=seed)
        assert got.text in ("cats", "moons")
        assert got.finish_reason == "stop" and END not in got.token_ids
        again = ask(llm, Constraint(regex="(cat|moon)s"), temperature=temperature, seed=seed,
                    max_tokens=len(got.token_ids))[0]  # fmt: skip
        same(again, got)


def test_end_of_text_is_the_models_choice_where_more_may_follow(llm):
    answers = ask(llm, Constraint(regex="[a-z ]*"), temperature=1.5, seed=1, n=20, max_tokens=30)
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert ended and all(answer.token_ids[-1] == END for answer in ended)
    assert all(set(answer.text) <= set("abcdefghijklmnopqrstuvwxyz ") for answer in answers)


def test_token_budget_and_stop_strings_apply(llm):
    (cut,) = ask(llm, Constraint(regex="[a-z ]{50}"), max_tokens=5)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    (whole,) = ask(llm, Constraint(regex="[a-z ]{50}x"))
    word = whole.text[7:10]
    (stopped,) = ask(llm, Constraint(regex="[a-z ]{50}x"), stop=word)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(word)]


def test_each_choice_has_a_state_of_its_own(llm):
    constraint = Constraint(json_schema=SCHEMA)
    choices = ask(llm, constraint, temperature=1.0, seed=4, n=4, max_tokens=150)
    assert len({choice.text for choice in choices}) > 1
    for choice in choices:
        assert fits_schema(json.loads(choice.text))
    same(choices[0], ask(llm, constraint, temperature=1.0, seed=4, max_tokens=150)[0])


def test_streaming(llm):
    params = SamplingParams(constraint=Constraint(json_schema=SCHEMA), max_tokens=150, temperature=0.7, seed=3)
    chunks = list(llm.stream("moon", params))
    whole = llm.generate("moon", params)[0].choices[0]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].finish_reason == "stop"
    assert fits_schema(json.loads(whole.text))


def test_logprobs_are_the_models_own(llm):
    (free,) = llm.generate("the cat", SamplingParams(max_tokens=1, logprobs=100))[0].choices
    (bound,) = ask(llm, Constraint(regex="[xyz]+"), max_tokens=1, logprobs=100)
    assert bound.text in ("x", "y", "z") and bound.text != free.text
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}, {"logit_bias": {END: 100.0}}], ids=str)
def test_dead_end(llm, settings):
    """This tokenizer has no bytes for Cyrillic: the output ends where it cannot go on."""
    (got,) = ask(llm, Constraint(regex="[ab]ж"), **settings)
    assert got.text in ("a", "b") and got.finish_reason == "length"


def test_dead_ends_and_accepted_drafts(llm):
    params = SamplingParams(constraint=Constraint(regex="[a-d]{6}ж"), max_tokens=20)
    known = llm.generate("the", params)
    assert known[0].choices[0].finish_reason == "length" and len(known[0].text) == 6
    got = llm.generate("the", params, Replay(known, beyond=encode("catcat")))
    same(got[0].choices[0], known[0].choices[0])
    assert got[0].choices[0].statistics.accepted > 0


def test_a_matcher_that_fails_is_replaced():
    """A limit met on one path ends that path only."""
    state = GRAMMARS.start(Constraint(regex="[a-e]{9}"))
    head, rest = [token("a"), token("b")], (token("c"), token("d"))
    state.commit(head)
    expected = state.masks([()])[0]
    state._matcher.consume_token(token("x"))
    assert state._matcher.is_error()
    assert state.bits(rest[:1]) is None
    assert torch.equal(state.masks([()])[0], expected)


# What a user is told


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Constraint(regex="("), "the regex cannot be used: unclosed group"),
        (Constraint(regex="(?=a)b"), "look-around"),
        (Constraint(regex=r"\bcat"), "regex cannot be used"),
        (Constraint(json_schema={"type": "objekt"}), "the JSON schema cannot be used: Invalid type: objekt"),
        (Constraint(json_schema={"not": {"type": "string"}}), "Unimplemented keys"),
        (Constraint(json_schema={"type": "integer", "minimum": 2, "maximum": 1}), "minimum .* is greater than"),
        (Constraint(json_schema={"$ref": "#/nowhere"}), "nowhere"),
        (Constraint(grammar="start: cat"), 'the grammar cannot be used: .*unknown name: "cat"'),
        (Constraint(grammar="cat"), "the grammar cannot be used"),
        (Constraint(regex="ж"), "the regex allows no text that this tokenizer can write"),
        (Constraint(grammar='start: "ж"'), "the grammar allows no text"),
    ],
    ids=str,
)
def test_unfit_constraints(llm, constraint, words):
    with pytest.raises(UserError, match=words) as caught:
        llm.generate(["cat", "dog"], [SamplingParams(max_tokens=2), SamplingParams(constraint=constraint, n=3)])
    assert "\n" not in str(caught.value)
    assert not llm.engine.busy and llm.engine.cache.used_bytes == 0


def test_models_without_tokenizer():
    engine = Engine(OracleModel(lambda history: torch.zeros(5), 5))
    with pytest.raises(UserError, match="needs a tokenizer"):
        engine.add([1], SamplingParams(constraint=Constraint(regex="a")))


def test_tokenizers_that_cannot_be_read():
    class Slow:
        eos_token_id = END

        def __len__(self) -> int:
            return VOCABULARY

    with pytest.raises(UserError, match="cannot use this tokenizer: Only fast tokenizers"):
        Grammars(Slow(), VOCABULARY, {END})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'hasten\[grammar\]'"):
        Grammars(TOKENIZER, VOCABULARY, {END})


def test_compiled_constraints_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "KEPT_COMPILED", 2)
    grammars = Grammars(TOKENIZER, VOCABULARY, {END})
    one, two, three = (Constraint(regex=text) for text in ("cat", "moon", "dog"))
    for constraint in (one, two, one, three):
        grammars.start(constraint)
    assert list(grammars._compiled) == [one, three]
