"""Constraints as users write them: text that spells special tokens, GBNF's escapes, keys that are counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten import Constraint, SamplingParams, UserError
from hasten.engine.sampling.grammar import Grammars, GrammarState
from helpers import END, START, VOCABULARY, make_tokenizer

TOKENIZER = make_tokenizer()
GRAMMARS = Grammars(TOKENIZER, VOCABULARY, {END})


def written(constraint: Constraint, grammars: Grammars = GRAMMARS, tokenizer: Any = TOKENIZER) -> list[int]:
    """The tokens of the only text of a constraint; each is one of those that may come, the end only at the end."""
    state, output = grammars.start(constraint), list[int]()
    while True:
        allowed = state.masks([()])[0].nonzero()[:, 0].tolist()
        assert END not in allowed
        assert not set(allowed) & set(tokenizer.all_special_ids)
        last = state.length(allowed[-1:])
        assert last is None or state.completes(allowed[-1:])
        output.append(allowed[-1])
        if last is not None:
            return output
        state.commit(output[-1:])


def accepts(state: GrammarState, text: str) -> bool:
    """Whether a text is one of the constraint's beginnings."""
    return state.accepts(tuple(TOKENIZER(text, split_special_tokens=True)["input_ids"]))


@pytest.mark.parametrize("text", ["end with </s> here", "<s>", "</s>", "</s></s>", "a<s", "é</s>€"])
def test_text_that_spells_a_special_token(text: str):
    schema, name = {"const": text}, {"properties": {text: {"const": 1}}, "required": [text]}
    name |= {"type": "object", "additionalProperties": False}
    literal = "".join("[<]" if character == "<" else character for character in text)
    for constraint in (
        Constraint(json_schema={**schema, "x-guidance": {"whitespace_flexible": False}}),
        Constraint(json_schema={**name, "x-guidance": {"whitespace_flexible": False}}),
        Constraint(regex=text),
        Constraint(regex=literal),
        Constraint(grammar=f"start: {json.dumps(text, ensure_ascii=False)}"),
        Constraint(grammar=f"root ::= {json.dumps(text, ensure_ascii=False)}"),
    ):
        assert text in TOKENIZER.decode(written(constraint))


@given(st.lists(st.sampled_from(["<s>", "</s>", "a", "<", "/s", ">", " ", "é", "cat"]), min_size=1, max_size=6))
def test_any_text_is_written_as_text(parts: list[str]):
    constraint = Constraint(json_schema={"const": "".join(parts)})
    assert json.loads(TOKENIZER.decode(written(constraint))) == "".join(parts)


def test_special_tokens_by_name():
    """What a grammar means by the token itself stays the token."""
    state = GRAMMARS.start(Constraint(grammar='start: "a" <s> "b"'))
    path = (*TOKENIZER("a")["input_ids"], START, *TOKENIZER("b")["input_ids"])
    assert state.accepts(path) and state.completes(path)


def test_a_vocabulary_with_padding():
    wide = Grammars(TOKENIZER, VOCABULARY + 77, {END})
    assert TOKENIZER.decode(written(Constraint(regex="a</s>"), wide)) == "a</s>"


def test_requests_end_at_the_end_of_the_text(llm):
    constraint = Constraint(json_schema={"const": "end with </s> here"})
    (got,) = llm.generate("the", SamplingParams(constraint=constraint, max_tokens=60))[0].choices
    assert (json.loads(got.text), got.finish_reason) == ("end with </s> here", "stop")


def test_bans_beside_a_constraint(llm):
    a, b = (TOKENIZER(text)["input_ids"][0] for text in "ab")
    params = SamplingParams(constraint=Constraint(regex="[ab]*"), max_tokens=12, min_tokens=6, bad_words=[[a, a]])
    (got,) = llm.generate("the", params)[0].choices
    assert len(got.token_ids) >= 6 and "aa" not in got.text and set(got.text) <= {"a", "b"}
    with pytest.raises(UserError, match="no token is possible"):
        llm.generate("the", SamplingParams(constraint=Constraint(regex="[ab]{4}"), bad_words=[[a], [b]]))


# GBNF


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (r'"\u0041bc"', "Abc"),
        (r'"\u00e9"', "é"),
        (r'"\U0001F600"', "😀"),
        (r'"\x41\x22\x5c\x5D"', 'A"\\]'),
        (r'"\u000a\n"', "\n\n"),
        ('"a\nb/[]"', "a\nb/[]"),
        (r"[\u0041] [\x5d] [\x2d] [\U0001F600]", "A]-😀"),
        (r'"a" # "\q{,3}' + "\n", "a"),
    ],
)
def test_escapes_of_gbnf(grammar: str, text: str):
    assert TOKENIZER.decode(written(Constraint(grammar=f"root ::= {grammar}"))) == text


ALPHABET = st.sampled_from([chr(code) for code in range(32, 127)] + ["\n", "é", "€", "😀"])
SPELLINGS = st.sampled_from(["plain", "x", "u", "U"])


def spell(character: str, how: str) -> str:
    code = ord(character)
    if how == "plain" and character not in '"\\[]^-\n':
        return character
    return (
        f"\\x{code:02X}"
        if code < 256 and how == "x"
        else f"\\u{code:04x}"
        if code < 65536 and how != "U"
        else f"\\U{code:08x}"
    )


@given(st.lists(st.tuples(ALPHABET, SPELLINGS), min_size=1, max_size=8))
def test_any_spelling_of_a_character_is_the_character(spelt: list[tuple[str, str]]):
    text, written_so = "".join(each for each, _ in spelt), "".join(spell(*each) for each in spelt)
    state = GRAMMARS.start(Constraint(grammar=f'root ::= "{written_so}"'))
    assert accepts(state, text) and not accepts(state, text + "a")
    state = GRAMMARS.start(Constraint(grammar=f"root ::= [{written_so}]"))
    other = GRAMMARS.start(Constraint(grammar=f"root ::= [^{written_so}]"))
    for character in {*text, "a", "-", "]", "é"}:
        assert accepts(state, character) == (character in text)
        assert accepts(other, character) == (character not in text)


def test_repetitions_and_dots_of_gbnf():
    state = GRAMMARS.start(Constraint(grammar='root ::= "a"{,3} .'))
    for text, right in (("aaa\n", True), ("b", True), ("aaaaa", False), ("aab", True)):
        assert accepts(state, text) == right


@pytest.mark.parametrize("escape", [r"\q", r"\u12", r"\xz1", r"\ud83d", r"\U00110000"])
def test_escapes_that_are_none(escape: str):
    with pytest.raises(UserError, match="the grammar cannot be used: "):
        GRAMMARS.start(Constraint(grammar=f'root ::= "{escape}"'))


@given(st.lists(st.sampled_from([*'"\\[]{},.#|()*+?ux0041 \n-^/', "root", "::=", "é"]), max_size=30))
def test_grammars_are_used_or_refused(parts: list[str]):
    try:
        GRAMMARS.start(Constraint(grammar="root ::= " + "".join(parts)))
    except UserError as error:
        assert "\n" not in str(error)


# Schemas


FREE = {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        {**FREE, "minProperties": 2},
        {"type": "object", "minProperties": 3, "properties": {"a": {}}, "required": ["a"]},
        {"type": "array", "items": {**FREE, "minProperties": 2}},
        {"type": "object", "properties": {"const": {**FREE, "minProperties": 2}}},
        {"anyOf": [{"type": "null"}, {**FREE, "minProperties": 2}]},
    ],
)
def test_keys_of_free_names_are_not_counted(schema: dict[str, Any]):
    with pytest.raises(UserError, match=r"minProperties \d counts keys of free names"):
        GRAMMARS.start(Constraint(json_schema=schema))


@pytest.mark.parametrize(
    "schema",
    [
        {**FREE, "minProperties": 1},
        {"type": "object", "minProperties": 2, "properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
        {"const": {"minProperties": 2}},
        {"type": "object", "properties": {"minProperties": {"type": "integer"}}},
    ],
)
def test_keys_that_can_be_counted(schema: dict[str, Any]):
    GRAMMARS.start(Constraint(json_schema=schema))


@pytest.mark.parametrize("depth", [100, 100_000])
def test_schemas_that_are_nested_deeply(depth: int):
    text = '{"not": ' * depth + "{}" + "}" * depth
    with pytest.raises(UserError):
        GRAMMARS.start(Constraint(json_schema=text))
