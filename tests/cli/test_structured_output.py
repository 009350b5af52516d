"""`hasten generate` with constraints: what comes out is valid, and what cannot be is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROMPT = "Is salt sweet?\nAnswer:"
SCHEMA = {"type": "object", "properties": {"sweet": {"type": "boolean"}}, "required": ["sweet"]}
SCHEMA |= {"additionalProperties": False}


def assert_refused(ran, *words: str) -> None:
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("hasten: ") and ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err


@pytest.mark.parametrize("method", ["plain", "ngram"])
def test_schema_as_text_and_as_file(hasten, tmp_path: Path, method: str):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    answers = [
        hasten("generate", PROMPT, "--json-schema", schema, "--method", method, "--max-tokens", "60", "--json").json()
        for schema in (str(file), json.dumps(SCHEMA))
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["finish_reason"] == "stop"
    assert isinstance(json.loads(answers[0]["text"])["sweet"], bool)


def test_regex_and_grammar(hasten, tmp_path: Path):
    assert hasten("generate", PROMPT, "--regex", "yes|no").out in ("yes\n", "no\n")
    file = tmp_path / "answer.lark"
    file.write_text('start: "ye" "s" | "no"\n')
    assert hasten("generate", PROMPT, "--grammar", str(file)).out in ("yes\n", "no\n")


def test_refused(hasten, tmp_path: Path):
    assert_refused(hasten("generate", PROMPT, "--regex", "("), "the regex cannot be used: unclosed group")
    assert_refused(hasten("generate", PROMPT, "--json-schema", '{"type": "objekt"}'), "Invalid type: objekt")
    assert_refused(hasten("generate", PROMPT, "--json-schema", '{"type": '), "not JSON")
    missing = str(tmp_path / "none.json")
    assert_refused(hasten("generate", PROMPT, "--json-schema", missing), "cannot read", "none.json", "No such file")
    assert_refused(hasten("generate", PROMPT, "--grammar", str(tmp_path)), "cannot read")
    assert_refused(hasten("generate", PROMPT, "--regex", "a", "--json-schema", "{}"), "exactly one of")
    assert_refused(hasten("generate", PROMPT, "--regex", "a", "--ignore-eos"), "ignore_eos")
