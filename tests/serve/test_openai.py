"""What clients get: the tokens that the library gives, whole or streamed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hasten import LLM, SamplingParams

LIST = "Copy the list: red cat moon\nAnswer:"
PROMPTS = [LIST, "12 + 45 =", "Reverse: a b c d\nAnswer:", "def add(a, b):\n    return", "Sort: 9 4 7\nAnswer:"]
QUESTION: Any = [{"role": "user", "content": "Copy the list: red cat moon"}]


def streamed(server: Any, route: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of an answer; the last line says that there are no more."""
    with server.http.stream("POST", route, json={"temperature": 0, "stream": True, **body}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    "method", ["plain", "ngram", "suffix", "auto", "token-recycling", "eagle", "medusa", "draft-model"]
)
def test_text_is_that_of_plain_decoding(server: Any, offline: LLM, method: str) -> None:
    for prompt in PROMPTS[:3]:
        plain = offline.generate(prompt, SamplingParams(max_tokens=40, logprobs=2))[0].choices[0]
        got = server.complete(prompt, max_tokens=40, method=method, logprobs=2, return_token_ids=True)
        choice = got["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (plain.text, plain.finish_reason)
        assert choice["token_ids"] == plain.token_ids
        assert choice["logprobs"]["token_logprobs"] == [item.logprob for item in plain.logprobs]
        assert got["hasten"]["method"] == method


def test_seeded_text_is_the_same_alone_and_in_a_crowd(server: Any, offline: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=5)
    expected = [offline.generate(prompt, params)[0].text for prompt in PROMPTS]

    def ask(number: int) -> str:
        method = ("plain", "ngram", "suffix")[number % 3]
        body = {"max_tokens": 30, "temperature": 0.8, "seed": 5, "method": method}
        return str(server.complete(PROMPTS[number % len(PROMPTS)], **body)["choices"][0]["text"])

    with ThreadPoolExecutor(15) as pool:
        got = list(pool.map(ask, range(30)))
    assert got == [expected[number % len(PROMPTS)] for number in range(30)]


@pytest.mark.parametrize("n", [1, 3])
def test_streams_are_the_whole(server: Any, n: int) -> None:
    body = {"prompt": PROMPTS[:2], "n": n, "seed": 3, "temperature": 1.0, "max_tokens": 25, "logprobs": 1}
    whole = server.post("/v1/completions", **body).json()
    events = streamed(server, **body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert len(whole["choices"]) == 2 * n
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own][-1] == choice["finish_reason"]
        assert all(each["finish_reason"] is None for each in own[:-1])
        told = [item for each in own for item in each["logprobs"]["token_logprobs"]]
        assert told == choice["logprobs"]["token_logprobs"]


def test_openai_library(server: Any, offline: LLM) -> None:
    expected = offline.chat(QUESTION, SamplingParams(max_tokens=20)).text
    client = server.openai
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens and len(content[0].top_logprobs) == 2
    assert content[0].top_logprobs[0].logprob == content[0].logprob
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    text = client.completions.create(model="tiny", prompt=LIST, temperature=0, max_tokens=20)
    assert text.choices[0].text == offline.generate(LIST, SamplingParams(max_tokens=20))[0].text


def test_a_schema_shapes_the_answer(server: Any) -> None:
    schema = {"enum": ["red cat", "cat"]}
    form = {"type": "json_schema", "json_schema": {"name": "word", "schema": schema}}
    contents = []
    for method in ("plain", "ngram", "suffix", "eagle"):
        asked = {"messages": QUESTION, "response_format": form, "max_tokens": 100, "temperature": 0, "method": method}
        contents.append(server.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"])
    assert len(set(contents)) == 1 and json.loads(contents[0]) in schema["enum"]
    choice = server.complete("A colour:", structured_outputs={"choice": ["a+b", "c d"]}, max_tokens=20)
    assert choice["choices"][0]["text"] in ("a+b", "c d")


def test_the_prompt_is_told_with_its_log_probabilities(server: Any, offline: LLM) -> None:
    generation = offline.generate(LIST, SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
    for most in (0, 1):
        answer = server.complete(LIST, max_tokens=most, echo=True, logprobs=1)
        choice, count = answer["choices"][0], len(generation.prompt_token_ids)
        told = choice["logprobs"]["token_logprobs"]
        assert len(told) == count + most == len(choice["logprobs"]["text_offset"])
        assert told[0] is None
        assert told[1:count] == [item.logprob for item in generation.prompt_logprobs if item is not None]
        assert choice["text"].startswith(LIST) and answer["usage"]["completion_tokens"] == most


def test_stops_and_budgets(server: Any) -> None:
    whole = server.complete(LIST, max_tokens=20)["choices"][0]["text"]
    stopped = server.complete(LIST, max_tokens=20, stop=[" moon"])["choices"][0]
    assert stopped["text"] == whole.partition(" moon")[0] and stopped["finish_reason"] == "stop"
    cut = server.complete(LIST, max_tokens=2)
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["completion_tokens"] == 2
    more = server.complete(LIST, max_tokens=12, ignore_eos=True)
    assert more["usage"]["completion_tokens"] == 12
    assert (
        "".join(each["choices"][0]["text"] for each in streamed(server, prompt=LIST, stop=" moon")) == stopped["text"]
    )


def test_characters_of_several_tokens_stay_whole(server: Any) -> None:
    for text in ("äöü 漢字 👩‍🚀", "Ω≈ç√"):
        ids = server.post("/tokenize", prompt=text).json()
        assert server.post("/detokenize", tokens=ids["tokens"]).json()["prompt"] == text
        body = {"prompt": f"Copy the list: {text}\nAnswer:", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
        whole = server.post("/v1/completions", **body).json()["choices"][0]["text"]
        assert "".join(each["choices"][0]["text"] for each in streamed(server, **body)) == whole


def test_a_prompt_that_goes_on_is_not_read_again(server: Any) -> None:
    long = "Copy the list: " + " ".join(f"word{number}" for number in range(60)) + "\nAnswer:"
    cold = server.complete(long, max_tokens=8, method="plain")
    warm = server.complete(long, max_tokens=8, method="plain")
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
