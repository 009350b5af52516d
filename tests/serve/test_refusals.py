"""What cannot be is refused in one shape, and harms nobody else."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.registry import decoders, find
from hasten.errors import UserError
from hasten.serve.bodies import WORDS

QUESTION = [{"role": "user", "content": "12 + 45 ="}]


def refused(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an error of the right shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in answer.text
    if param is not None:
        assert error["param"] == param
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokns": 3}, "max_tokns"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 300}, None),
        ({"stop": 3}, "stop"),
        ({"top_p": 0}, None),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 500}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"stop": [""]}, None),
        ({"logit_bias": {"x": 1}}, None),
        ({"stop_token_ids": [10**9]}, None),
        ({"method": "nothing"}, None),
        ({"method": "draft-model:model=/etc"}, "method"),
        ({"method": "eagle:head=/etc"}, "method"),
        ({"method": "lud:file=README.md"}, "method"),
        ({"method": "ngram+stand: tree = README.md"}, "method"),
        ({"method": "vocabtrim:calibration=README.md"}, "method"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, None),
        ({"prompt": []}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": [10**9]}, None),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "word " * 3000}, None),
    ],
)  # fmt: skip
def test_fields_that_cannot_be(server: Any, body: dict[str, Any], param: str | None) -> None:
    whole = json.dumps({"prompt": "x", "max_tokens": 2, **body})
    answer = server.http.post("/v1/completions", content=whole, headers={"content-type": "application/json"})
    refused(answer, 400, param)
    assert server.empty()


def test_words_that_clients_may_give_name_no_files() -> None:
    """Each is one of a few that its method knows."""
    named = {(slug, field.name) for slug, method in decoders().items() for field in fields(method.parameters)}
    assert {name for _, name in named} >= WORDS
    for slug, name in sorted(named):
        if name in WORDS:
            with pytest.raises(UserError):
                find(slug).parameters(**{name: "README.md"})


def test_other_models_tools_and_routes(server: Any) -> None:
    assert "tiny" in refused(server.post("/v1/completions", model="gpt-9", prompt="x"), 404, "model")
    tools = [{"type": "function", "function": {"name": "f"}}]
    refused(server.post("/v1/chat/completions", messages=QUESTION, tools=tools), 400, "tools")
    assert server.post("/v1/chat/completions", messages=QUESTION, tools=tools, tool_choice="none").status_code == 200
    refused(server.post("/v1/chat/completions", messages=[]), 400, "messages")
    refused(server.post("/v1/chat/completions", messages=QUESTION, top_logprobs=2), 400, "top_logprobs")
    refused(server.http.get("/v1/nothing"), 404)
    refused(server.http.get("/v1/completions"), 405)
    refused(server.http.get("/v1/models/nothing"), 404)
    refused(server.post("/tokenize"), 400)
    half = {"content": '{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}}
    refused(server.http.post("/tokenize", **half), 400)
    refused(server.post("/detokenize", tokens=[10**9]), 400, "tokens")


def test_schemas_that_are_too_deep(server: Any) -> None:
    schema: Any = {"type": "string"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    refused(server.post("/v1/chat/completions", messages=QUESTION, response_format=form), 400)
    assert server.empty()


def test_bodies_that_are_too_large(serving: Any) -> None:
    with serving(body_bytes=1000) as server:
        refused(server.post("/v1/completions", prompt="x" * 2000), 413)
        parts = (b"x" * 300 for _ in range(10))
        refused(server.http.post("/v1/completions", content=parts), 413)
        assert server.complete("12 + 45 =", max_tokens=2)["choices"]


def test_keys(serving: Any) -> None:
    with serving(keys=("first", "second")) as server:
        assert server.complete("12 + 45 =", max_tokens=2)["choices"]
        assert server.http.get("/v1/models", headers={"Authorization": "", "x-api-key": "second"}).status_code == 200
        for route in ("/v1/models", "/metrics", "/tokenizer_info", "/openapi.json", "/nothing"):
            refused(server.http.get(route, headers={"Authorization": "Bearer third"}), 401)
            refused(server.http.get(route, headers={"Authorization": ""}), 401)
        for route in ("/health", "/ready"):
            assert server.http.get(route, headers={"Authorization": ""}).status_code == 200
        # Those of one key learn nothing of another's prompts.
        assert "access-control-allow-origin" not in server.http.get("/health", headers={"Origin": "http://a"}).headers


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["prompt", "messages", "max_tokens", "temperature", "n", "stop", "logit_bias", "logprobs", "stream", "seed",
     "response_format", "structured_outputs", "stream_options", "method", "stop_token_ids", "min_tokens", "tools"]
)  # fmt: skip


@settings(max_examples=150)
@given(st.dictionaries(FIELDS, VALUES, max_size=4), st.booleans())
def test_any_body_is_answered(server: Any, body: dict[str, Any], chat: bool) -> None:
    base = {"messages": QUESTION, "max_tokens": 2} if chat else {"prompt": "12 + 45 =", "max_tokens": 2}
    text = json.dumps({**base, **body}, allow_nan=True)
    if len(text) > 5000:
        return
    route = "/v1/chat/completions" if chat else "/v1/completions"
    answer = server.http.post(route, content=text, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 9999])
def test_bodies_that_are_no_json(server: Any, content: bytes) -> None:
    answer = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    refused(answer, 400)


def test_neighbours_are_as_before(server: Any) -> None:
    assert server.empty()
    assert (
        server.complete("Copy the list: red cat moon\nAnswer:", max_tokens=8)["choices"][0]["text"] == " red cat moon"
    )
