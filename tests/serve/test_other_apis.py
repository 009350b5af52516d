"""Anthropic's messages and OpenAI's responses, by their own libraries."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from hasten import LLM, SamplingParams

QUESTION: Any = [{"role": "user", "content": "Copy the list: red cat moon"}]


@pytest.fixture(scope="module")
def claude(server: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.address, api_key="none", max_retries=0)


def test_messages(claude: anthropic.Anthropic, offline: LLM) -> None:
    expected = offline.chat(QUESTION, SamplingParams(max_tokens=20)).text
    asked: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**asked)
    assert whole.content[0].type == "text" and whole.content[0].text == expected
    assert (whole.role, whole.stop_reason, whole.stop_sequence) == ("assistant", "end_turn", None)
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == "end_turn"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert claude.messages.create(**{**asked, "messages": parts}).content == whole.content
    counted = claude.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_why_a_message_ends(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "tiny", "messages": QUESTION, "extra_body": {"temperature": 0}}
    stopped = claude.messages.create(**asked, max_tokens=20, stop_sequences=["nothing", " moon"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " moon")
    assert claude.messages.create(**asked, max_tokens=1).stop_reason == "max_tokens"
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        claude.messages.create(**asked, max_tokens=2, tools=[{"name": "f", "input_schema": {"type": "object"}}])
    image: Any = [{"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}]
    with pytest.raises(anthropic.BadRequestError, match="text"):
        claude.messages.create(model="tiny", max_tokens=2, messages=[{"role": "user", "content": image}])


def test_responses(server: Any, offline: LLM) -> None:
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    expected = offline.chat(system, SamplingParams(max_tokens=20)).text
    client = server.openai
    asked: Any = {"model": "tiny", "input": QUESTION[0]["content"], "instructions": "Be brief.", "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=20)
    assert whole.output_text == expected and whole.status == "completed"
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**asked, max_output_tokens=20, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].type == "response.completed" and events[-1].response.output_text == expected
    cut = client.responses.create(**asked, max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION[0]["content"]}]}]
    again = client.responses.create(**{**asked, "input": parts}, max_output_tokens=20)
    assert again.output_text == expected


def test_responses_in_a_shape(server: Any) -> None:
    form = {"type": "json_schema", "name": "word", "schema": {"enum": ["red", "cat"]}}
    asked = {"input": "A word:", "text": {"format": form}, "temperature": 0, "max_output_tokens": 20}
    answer = server.post("/v1/responses", **asked).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) in ("red", "cat")


@pytest.mark.parametrize(
    "body",
    [
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"type": "reasoning"}]},
        {"input": []},
        {"background": True},
        {"text": {"format": {"type": "json_schema"}}},
        {"maximum": 3},
    ],
)
def test_responses_that_cannot_be(server: Any, body: dict[str, Any]) -> None:
    answer = server.post("/v1/responses", **{"input": "x", "max_output_tokens": 2, **body})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
