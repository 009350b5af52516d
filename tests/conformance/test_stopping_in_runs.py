"""Wherever an output ends inside an accepted run, it ends as plain decoding's does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from cases import KINDS, PROMPTS, SPECS

from hasten import SamplingParams, UserError
from hasten.engine import Draft
from helpers import CONTEXT, END, VOCABULARY, Bushy, Replay, Scripted, same


def answers(llm, prompts, **changes):
    """Plain decoding's generations; prompts are numbered by their seeds, odd ones sample."""
    asked = [
        SamplingParams(**{"seed": seed, "temperature": 0.8 * (seed % 2), "max_tokens": 60, **changes})
        for seed in range(len(prompts))
    ]
    return asked, llm.generate(prompts, asked, "plain")


@pytest.fixture(scope="module")
def long(llm):
    """40 prompts decoded by plain: (parameters, generations)."""
    return answers(llm, PROMPTS[:40])


def agree(llm, asked, expected, method) -> int:
    """Decode with a method, compare; returns how many tokens were accepted."""
    got = llm.generate([generation.prompt_token_ids for generation in expected], asked, method)
    for mine, theirs in zip(got, expected, strict=True):
        for one, other in zip(mine.choices, theirs.choices, strict=True):
            same(one, other)
    return sum(choice.statistics.accepted for generation in got for choice in generation.choices)


@pytest.mark.parametrize("beyond", [[], [7, 8, 9] * 5, [END] * 9], ids=["nothing", "tokens", "more ends"])
@pytest.mark.parametrize("kind", [Replay, Bushy])
def test_end_of_text_inside_the_run(llm, long, kind, beyond):
    asked, expected = long
    ended = [index for index, generation in enumerate(expected) if generation.choices[0].finish_reason == "stop"]
    assert len(ended) >= 5
    assert all(expected[index].token_ids[-1] == END for index in ended)
    for length in (1, 3, 8):
        drafter = kind([expected[index] for index in ended], length, beyond)
        assert agree(llm, [asked[index] for index in ended], [expected[index] for index in ended], drafter) > 0


def test_ignore_eos(llm, long):
    asked, expected = answers(llm, PROMPTS[:16], ignore_eos=True)
    assert all(len(generation.token_ids) == 60 for generation in expected)
    assert any(END in generation.token_ids[:-1] for generation in expected)
    assert agree(llm, asked, expected, Replay(expected, 8)) > 16 * 60 * 0.8


@pytest.fixture(scope="module")
def short(llm, long):
    """The first of them, with every budget of a few tokens."""
    cut = {most: answers(llm, PROMPTS[:8], max_tokens=most) for most in range(1, 13)}
    for most, (_, generations) in cut.items():
        for whole, generation in zip(long[1], generations, strict=False):
            assert generation.token_ids == whole.token_ids[:most]
    return cut


@pytest.mark.parametrize("spec", ["replay", "bushy", *SPECS])
def test_every_token_budget(llm, long, short, spec):
    known = long[1][:8]
    for asked, expected in short.values():
        drafter = {"replay": Replay(known, 5, [3] * 9), "bushy": Bushy(known, 5, [3] * 9)}.get(spec, spec)
        agree(llm, asked, expected, drafter)


@pytest.fixture(scope="module")
def full(llm):
    """Plain decoding up to the end of the context."""
    rooms = [1, 2, 3, 5, 9, 40]
    rng = random.Random(5)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(CONTEXT - room)] for room in rooms]
    asked, expected = answers(llm, prompts, ignore_eos=True, max_tokens=None)
    for room, generation in zip(rooms, expected, strict=True):
        assert (len(generation.token_ids), generation.choices[0].finish_reason) == (room, "length")
    return asked, expected


@pytest.mark.parametrize("spec", ["replay", "bushy", "over-long", *SPECS])
def test_context_limit(llm, full, spec):
    asked, expected = full
    drafters = {
        "replay": Replay(expected, 64, [4] * 99),
        "bushy": Bushy(expected, 6, [4] * 9),
        "over-long": Scripted(lambda request: Draft.chain([9] * 300)),
    }
    agree(llm, asked, expected, drafters.get(spec, spec))


def test_prompt_without_room(llm):
    for length in (CONTEXT, CONTEXT + 1, 3 * CONTEXT):
        with pytest.raises(UserError, match=f"{length} tokens, which leaves no room in the context of {CONTEXT}"):
            llm.generate([[5] * length])
    assert llm.engine.cache.used_bytes == 0


def border_strings(llm, tokens: list[int], rng: random.Random) -> list[str]:
    """Stop strings out of a text: within a token, and across the borders of two and three."""
    pieces = [llm.tokenizer.decode([token]) for token in tokens]
    at = rng.randrange(1, len(pieces) - 3)
    strings = [pieces[at], pieces[at][-1:] + pieces[at + 1][:1], pieces[at][-1:] + pieces[at + 1] + pieces[at + 2][:1]]
    return [string for string in strings if string and "�" not in string]


@pytest.mark.parametrize("spec", ["replay", "bushy", *SPECS])
def test_stop_strings(llm, long, spec):
    rng = random.Random(2)
    asked, known = long
    drafter = {"replay": Replay(known, 8), "bushy": Bushy(known, 4)}.get(spec, spec)
    cases = [
        (index, stop)
        for index, generation in enumerate(known)
        if len(generation.token_ids) > 8
        for stop in border_strings(llm, generation.token_ids[:40], rng)
    ]
    assert len(cases) > 20
    wanted = [replace(asked[index], stop=(stop, "no such text")) for index, stop in cases]
    got = llm.generate([known[index].prompt_token_ids for index, _ in cases], wanted, drafter)
    for (index, stop), generation in zip(cases, got, strict=True):
        whole = known[index].text
        assert generation.text == whole[: whole.index(stop)]
        assert generation.choices[0].finish_reason == "stop"
        # Tokens end with the one that completes the stop string.
        assert generation.token_ids == known[index].token_ids[: len(generation.token_ids)]
        assert stop in llm.tokenizer.decode(generation.token_ids)
        assert stop not in llm.tokenizer.decode(generation.token_ids[:-1])


@pytest.mark.parametrize("spec", ["replay", *SPECS])
def test_streams_show_no_part_of_a_stop_string(llm, long, spec):
    rng = random.Random(3)
    asked, known = long
    drafter = {"replay": Replay(known, 8)}.get(spec, spec)
    for index in range(0, 40, 5):
        tokens = known[index].token_ids
        if len(tokens) < 12:
            continue
        for stop in [*border_strings(llm, tokens[:40], rng), known[index].text[5:7] + "\0"]:
            wanted = replace(asked[index], stop=stop)
            whole = known[index].text
            final = whole[: whole.index(stop)] if stop in whole else whole
            shown, streamed = "", []
            for chunk in llm.stream(known[index].prompt_token_ids, wanted, drafter):
                shown += chunk.text
                streamed += chunk.token_ids
                assert final.startswith(shown)
            assert shown == final == chunk.completion.text
            assert streamed == chunk.completion.token_ids
            assert chunk.finish_reason == chunk.completion.finish_reason


def test_stop_strings_under_every_kind(llm):
    """Penalties and filters do not disturb where text ends."""
    alone = {"min_tokens": 0, "stop_token_ids": ()}
    asked = [SamplingParams(max_tokens=40, seed=4, **{**settings, **alone}) for settings in KINDS.values()]
    prompts = [PROMPTS[7]] * len(asked)
    known = llm.generate(prompts, asked, "plain")
    for parameters, generation in zip(asked, known, strict=True):
        stop = next(generation.text[at : at + 3] for at in range(4, 40) if "�" not in generation.text[at : at + 3])
        wanted = replace(parameters, stop=[stop, "zzzz"])
        expected = llm.generate([PROMPTS[7]], wanted, "plain")
        assert expected[0].text == generation.text[: generation.text.index(stop)]
        agree(llm, [wanted], expected, Replay([generation], 7))
