"""What a user holds: arguments, errors, chat, streams, and the checkpoint's own settings."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Draft
from hasten.errors import Notice
from hasten.model import tokenizer
from hasten.model.weights import Piece, Pieces
from helpers import END, START, VOCABULARY, Scripted, same

SHORT = SamplingParams(max_tokens=6)
TEXT = "the cat and"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def rewrite(file: Path, **changes) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    raw.update(changes)
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def test_text_and_ids(llm):
    ids = llm.encode(TEXT)
    assert llm.tokenizer.decode(ids) == TEXT
    one = llm.generate(TEXT, SHORT)
    for prompts in (ids, tuple(ids), [TEXT], [ids], (TEXT,)):
        (other,) = llm.generate(prompts, SHORT)
        assert other.prompt_token_ids == ids
        same(other.choices[0], one[0].choices[0])
    assert one[0].text == llm.tokenizer.decode(one[0].token_ids, skip_special_tokens=True)
    assert one[0].choices[0].tokens_per_second > 0
    assert llm.generate([], SHORT) == []


def test_transformed_weights(tiny, llm):
    def without_layers(pieces: Pieces) -> Pieces:
        silent = {
            name: Piece(0 * pieces.weights[name].weight) for name in {"attention_out", "down"} & {*pieces.weights}
        }
        return replace(pieces, weights={**pieces.weights, **silent})

    changed = LLM(tiny, transforms=[without_layers])
    row = changed.model.embedding[llm.encode(TEXT)[-1]]
    assert changed.generate(TEXT, SHORT)[0].token_ids[0] == int(changed.model.logits(row[None], None).argmax())
    assert LLM(tiny, transforms=[lambda pieces: pieces]).generate(TEXT, SHORT)[0].token_ids == (
        llm.generate(TEXT, SHORT)[0].token_ids
    )


def test_one_setting_per_prompt(llm):
    asked = [SamplingParams(max_tokens=count) for count in (2, 4)]
    got = llm.generate([TEXT, TEXT], asked, ["plain", "ngram"])
    assert [len(generation.token_ids) for generation in got] == [2, 4]
    assert got[0].token_ids == got[1].token_ids[:2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([TEXT] * 3, [SHORT] * 2), "params has 2 entries for 3 prompts"),
        (([TEXT] * 2, SHORT, ["plain"] * 3), "method has 3 entries for 2 prompts"),
        ((TEXT, SHORT, "n-gram"), "unknown method 'n-gram'; did you mean ngram"),
        ((TEXT, SHORT, "ngram:length=99"), "length must be between 1 and 64"),
        (("", SHORT), "the prompt is empty"),
        (([TEXT, []], SHORT), "the prompt is empty"),
        (([[1, VOCABULARY]], SHORT), f"token id {VOCABULARY} is outside the vocabulary"),
        ((TEXT * 200, SHORT), "leaves no room in the context"),
    ],
)
def test_refused(llm, arguments, message):
    with pytest.raises(UserError, match=message):
        llm.generate(*arguments)
    # Prompts that were accepted before the bad one are given up.
    assert not llm.engine.busy
    assert llm.engine.cache.used_bytes == 0


def test_bad_arguments_of_loading(tiny, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        LLM(tmp_path / "nowhere")
    with pytest.raises(UserError, match="unknown method"):
        LLM(tiny, method="nothing")
    with pytest.raises(UserError, match="dtype must be"):
        LLM(tiny, dtype="int3")
    with pytest.raises(UserError, match="not available here"):
        LLM(tiny, device="cuda:99")


def test_default_method(tiny):
    drafter = Scripted(lambda request: Draft())
    llm = LLM(tiny, method=drafter)
    llm.generate(TEXT, SHORT)
    llm.generate(TEXT, SHORT, "plain")
    assert len(drafter.began) == 1


def test_interruption_gives_everything_back(llm):
    def interrupt(request):
        if len(request.output) > 2:
            raise KeyboardInterrupt
        return Draft()

    with pytest.raises(KeyboardInterrupt):
        llm.generate([TEXT] * 3, SamplingParams(max_tokens=9, n=2), Scripted(interrupt))
    assert not llm.engine.busy
    assert llm.engine.cache.used_bytes == 0


# Chat


def test_chat(llm):
    messages = [{"role": "user", "content": "the moon"}, {"role": "assistant", "content": "and"}]
    expected = llm.encode("user: the moon\nassistant: and\nassistant:")
    assert llm.apply_chat_template(messages) == expected
    answer = llm.chat(messages, SHORT, "ngram")
    assert answer.prompt_token_ids == expected
    same(answer.choices[0], llm.generate([expected], SHORT)[0].choices[0])


def test_chat_refused(llm, copy):
    with pytest.raises(UserError, match=r"the chat template refuses the messages: .*no such role"):
        llm.chat([{"role": "wizard", "content": "hm"}])
    for file in copy.glob("*.jinja"):
        file.unlink()
    rewrite(copy / "tokenizer_config.json", chat_template="absent")
    with pytest.raises(UserError, match="has no chat template"):
        LLM(copy).chat([{"role": "user", "content": "hm"}])


LOOPS = (
    "{% for one in range(99999) %}{% for two in range(99999) %}{% set three = one %}{% endfor %}{% endfor %}",
    "{% macro again(depth) %}{% for one in range(9) %}{{ again(depth - 1) if depth }}{% endfor %}{% endmacro %}"
    "{{ again(40) }}",
)


@pytest.mark.parametrize("template", LOOPS)
def test_a_chat_template_that_comes_to_no_end(copy, monkeypatch, template):
    endless = LLM(copy)
    endless.tokenizer.chat_template = template
    monkeypatch.setattr(tokenizer, "TEMPLATE_SECONDS", 0.3)
    before = threading.active_count()
    with pytest.raises(UserError, match=r"did not come to an end within 0\.3 seconds"):
        endless.chat([{"role": "user", "content": "hm"}])
    for thread in threading.enumerate()[before:]:
        thread.join(20)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "template", ["{{ 9**9**9 }}", "{% set two = 2 %}{% generation %}{{ (two) ** 3 }}{% endgeneration %}"]
)
def test_a_chat_template_that_computes_powers_is_not_run(llm, monkeypatch, template):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=r"^the chat template computes powers, which may never end: it was not run$"):
        llm.chat([{"role": "user", "content": "hm"}])


def test_stars_that_are_no_powers(llm, monkeypatch):
    template = "**{{ 2 * 3 }}**{{ '**' }}{# 2**3 #}{{ dict(a=1, **{'b': 2}) }}{{ dict(** {'c': 3}) }}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    assert llm.apply_chat_template([{"role": "user", "content": "hm"}]) == llm.encode("**6****{'a': 1, 'b': 2}{'c': 3}")


# The checkpoint's generation config


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, {}),
        ({"temperature": 0.3, "top_k": 5}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
    ],
    ids=str,
)
def test_default_params(copy, config, expected):
    (copy / "generation_config.json").write_text(json.dumps(config))
    assert LLM(copy).default_params == SamplingParams(**expected)


def test_default_params_without_a_generation_config(copy):
    (copy / "generation_config.json").unlink(missing_ok=True)
    llm = LLM(copy)
    assert llm.default_params == SamplingParams()
    assert llm.engine.end_ids == {END}


@pytest.mark.parametrize(
    "generation, model, expected",
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6, 7, END}),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {5, 7, END}),
        ({}, {"eos_token_id": [7, None, 8]}, {7, 8, END}),
        ({"eos_token_id": None}, {"eos_token_id": None}, {END}),
        ({"eos_token_id": "<s>"}, {"eos_token_id": ["</s>"]}, {START, END}),
    ],
)
def test_end_of_text_ids(copy, generation, model, expected):
    (copy / "generation_config.json").write_text(json.dumps(generation))
    rewrite(copy / "config.json", **model)
    assert LLM(copy).engine.end_ids == expected


@pytest.mark.parametrize("strange", [VOCABULARY, -1, "<|never|>", 2.0, True, {"id": 2}])
def test_end_ids_that_are_none(copy, strange):
    rewrite(copy / "generation_config.json", eos_token_id=[END, strange])
    with pytest.warns(Notice, match=f"names {re.escape(repr(strange))} as end of text, which the vocabulary does not"):
        assert LLM(copy).engine.end_ids == {END}
    for file in ("generation_config.json", "config.json"):
        rewrite(copy / file, eos_token_id=strange)
    rewrite(copy / "tokenizer_config.json", eos_token="absent")
    with pytest.raises(UserError, match="no text would ever end"):
        LLM(copy)


def test_any_end_id_ends_the_text(copy):
    rewrite(copy / "generation_config.json", eos_token_id=[END])
    tokens = LLM(copy).generate([[9]], SamplingParams(max_tokens=10, ignore_eos=True))[0].token_ids
    rewrite(copy / "generation_config.json", eos_token_id=[END, tokens[4]])
    ended = LLM(copy).generate([[9]], SamplingParams(max_tokens=10))[0]
    assert ended.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert ended.choices[0].finish_reason == "stop"


# Streams


def test_stream(llm):
    asked = SamplingParams(max_tokens=20, temperature=0.8, seed=3, logprobs=1)
    whole = llm.generate(TEXT, asked)[0].choices[0]
    chunks = list(llm.stream(TEXT, asked, "ngram:minimum=1"))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert all(len(chunk.kinds) == len(chunk.token_ids) for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    same(chunks[-1].completion, whole)


def test_stream_of_several_choices(llm):
    asked = SamplingParams(max_tokens=15, temperature=1, seed=3, n=3)
    expected = llm.generate(TEXT, asked)[0].choices
    chunks = list(llm.stream(TEXT, asked))
    for choice in range(3):
        own = [chunk for chunk in chunks if chunk.choice == choice]
        assert "".join(chunk.text for chunk in own) == expected[choice].text
        assert [chunk.completion is not None for chunk in own] == [False] * (len(own) - 1) + [True]


def test_streams_side_by_side(llm):
    """Two open streams, and a call in between, do not get in each other's way."""
    asked = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [TEXT, "the moon sings"]
    expected = llm.generate(prompts, asked)
    streams = [llm.stream(prompt, asked) for prompt in prompts]
    texts, ends = ["", ""], [0, 0]
    for turn in range(12):
        for index, stream in enumerate(streams):
            chunk = next(stream)
            texts[index] += chunk.text
            ends[index] += chunk.completion is not None
        if turn == 4:
            assert llm.generate("another", asked)[0].choices[0].finish_reason == "length"
    assert texts == [generation.text for generation in expected]
    assert ends == [1, 1]
    for stream in streams:
        assert next(stream, None) is None
    assert not llm.engine.busy


def test_bad_prompts_of_streams(llm):
    with pytest.raises(UserError, match="the prompt is empty"):
        next(llm.stream([], SHORT))
