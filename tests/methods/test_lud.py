"""LUD: the paper's loop, by a model of transformers; its rules, by hand; and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hasten import LLM, SamplingParams, UserError
from hasten.engine import Engine
from hasten.methods.drafters.lud import FILE, Lud, load_placeholder, save_placeholder
from helpers import CONTEXT, END

PROMPTS = [[5, 17, 40, 5, 17], [9], [number * 13 % 140 + 2 for number in range(60)], [3, 3, 3]]
SPECS = ["lud:beta=0.01,repeated=0.01", "lud:beta=0.03,repeated=0.2", "lud:beta=0.05,placeholders=2,repeated=0.05"]


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Callable[[list[int], int], torch.Tensor]:
    """(text, placeholders) to log-probabilities behind the text and behind each placeholder, by transformers."""
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="eager")
    vector = load_placeholder(tiny / FILE, model.config.hidden_size)[0]

    @torch.inference_mode()
    def said(text: list[int], count: int) -> torch.Tensor:
        embedded = torch.cat([model.get_input_embeddings()(torch.tensor(text)), vector.repeat(count, 1)])
        logits: torch.Tensor = model(inputs_embeds=embedded[None]).logits[0, len(text) - 1 :]
        return logits.log_softmax(-1)

    return said


def written(said, prompt: list[int], most: int, beta: float, repeated: float, count: int) -> tuple[list[int], int]:
    """The paper's loop, read from the text anew in each pass, and its passes; no placeholders behind the prompt."""
    text, passes = [*prompt, int(said(prompt, 0).argmax())], 1
    while END not in text[len(prompt) :] and len(text) < len(prompt) + most:
        passes += 1
        sure: list[float] = []
        for row in said(text, count).exp():
            likely, token = row.max(-1)
            sure.append(float(likely))
            tried = [*text, int(token)]
            doubled = any(
                tried[-n:] == tried[-2 * n : -n] and min(sure[-n:]) < repeated
                for n in range(1, len(sure) + 1)
                if len(tried) >= 2 * n
            )
            # The last token of a budget is the model's own.
            spent = len(text) >= len(prompt) + most - 1
            if len(sure) > 1 and (sure[-1] < beta or doubled or text[-1] == END or spent):
                break
            text = tried
    output = text[len(prompt) :][:most]
    return output[: output.index(END) + 1] if END in output else output, passes


@pytest.mark.parametrize("spec", SPECS)
def test_the_papers_loop(llm: LLM, reference, spec: str):
    own = llm.engine.drafter(spec)[1]
    assert isinstance(own, Lud)
    settings = own.parameters
    saved = 0
    for prompt in PROMPTS:
        expected, passes = written(reference, prompt, 40, settings.beta, settings.repeated, settings.placeholders or 3)
        got = llm.generate([prompt], SamplingParams(max_tokens=40), spec)[0].choices[0]
        assert got.token_ids == expected
        # What was taken last is read once more before it comes out.
        assert passes <= got.statistics.steps <= passes + 1
        saved += len(expected) - passes
    assert saved > 10


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_is_kept_is_what_the_model_makes_of_the_text(tiny: Path, backend: str):
    """Along a text of spans, probabilities are those of one pass over it: nothing of a placeholder is in the cache."""
    llm = LLM(tiny, dtype="float32", backend=backend)
    asked = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0)
    for got, prompt in zip(llm.generate(PROMPTS, asked, SPECS[0]), PROMPTS, strict=True):
        read = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (again,) = llm.generate([prompt + got.token_ids], read, "plain")
        mine = [each.logprob for each in got.choices[0].logprobs]
        theirs = [each.logprob for each in again.prompt_logprobs[len(prompt) :]]  # type: ignore[union-attr]
        assert got.choices[0].statistics.accepted > 4
        assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_memory_that_is_short_changes_nothing(llm: LLM, share: float):
    """A span is part of the text already: it does not give way as other drafts do."""
    asked = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [PROMPTS[2][:30], PROMPTS[1], PROMPTS[2][5:50]]
    alone = [llm.generate([prompt], asked, SPECS[0])[0].token_ids for prompt in prompts]

    def decoded(limit: int | None) -> Engine:
        engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder), cache_bytes=limit)
        requests = [engine.add(prompt, asked, SPECS[0])[0] for prompt in prompts]
        list(engine.run())
        assert [request.output for request in requests] == alone
        read = sum(request.statistics.prompt_rows for request in requests)
        assert (read > sum(map(len, prompts))) == (limit is not None)
        return engine

    decoded(int(share * decoded(None).cache.peak_bytes))


def test_the_end_of_the_context(llm: LLM):
    prompt = [number * 13 % 140 + 2 for number in range(CONTEXT - 9)]
    got = llm.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True), SPECS[0])[0].choices[0]
    assert len(prompt) + len(got.token_ids) == CONTEXT and got.finish_reason == "length"


def test_sampled_texts_are_plain_decodings(llm: LLM):
    asked = [SamplingParams(max_tokens=30, temperature=0.9, seed=seed) for seed in range(len(PROMPTS))]
    plain = llm.generate(PROMPTS, asked, "plain")
    ours = llm.generate(PROMPTS, asked, SPECS[0])
    assert [each.token_ids for each in ours] == [each.token_ids for each in plain]
    assert sum(each.choices[0].statistics.proposed for each in ours) > 0


@pytest.mark.parametrize(
    ("text", "sure", "repeats"),
    [
        ([4, 7, 7], [0.5, 0.5], True),
        ([4, 7, 7], [0.995, 0.995], False),
        # Only what this step says is judged, and as much of it as is a repetition.
        ([7, 4, 7], [0.5], False),
        ([1, 2, 1, 2], [0.5, 0.5], True),
        ([1, 2, 1, 2], [0.5], False),
        ([2, 1, 2, 1], [0.2, 0.995, 0.995], False),
        ([3], [0.1], False),
    ],
)
def test_repetitions(llm: LLM, text: list[int], sure: list[float], repeats: bool):
    own = llm.engine.drafter("lud")[1]
    assert isinstance(own, Lud) and own._repeats(text, sure) is repeats


def test_nothing_is_left_behind(llm: LLM):
    engine = Engine(llm.model, llm.tokenizer, llm.engine.end_ids, folder=str(llm.folder))
    own = engine.drafter(SPECS[0])[1]
    assert isinstance(own, Lud)
    first, second = (engine.add(prompt, SamplingParams(max_tokens=30), SPECS[0])[0] for prompt in PROMPTS[:2])
    for _ in range(4):
        engine.step()
    assert own._spans.keys() <= {first.id, second.id} and own._spans
    engine.abort(first)
    list(engine.run())
    assert not own._spans and engine.cache.used_bytes == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("beta=0", "beta must be positive"),
        ("placeholders=17", "between 0"),
        ("placeholders=4", "at most 3, which the model was trained with"),
        ("repeated=0", "repeated must be positive"),
        ("file=/nowhere/lud.safetensors", "hasten train lud"),
    ],
)
def test_what_cannot_be(llm: LLM, settings: str, told: str):
    with pytest.raises(UserError, match=told):
        llm.engine.drafter(f"lud:{settings}")


def test_files_that_do_not_fit(tiny: Path, tmp_path: Path):
    folder = tmp_path / "model"
    copytree(tiny, folder)
    hidden = LLM(folder, dtype="float32").model.config.hidden_size

    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told):
            LLM(folder, dtype="float32").generate([PROMPTS[0]], SamplingParams(max_tokens=2), "lud")

    save_placeholder(torch.zeros(hidden + 1), 3, folder / FILE)
    refused("must be")
    save_placeholder(torch.zeros(hidden), 0, folder / FILE)
    refused("count must be between 1 and 16")
    save_file({"placeholder": torch.zeros(hidden)}, folder / FILE)
    refused("has no count")
    (folder / FILE).write_bytes(b"nothing")
    refused("damaged")
    (folder / FILE).unlink()
    refused("was not trained for it: `hasten train lud")


def test_it_is_read_as_it_was_written(tmp_path: Path):
    vector = torch.randn(7, generator=torch.Generator().manual_seed(0))
    save_placeholder(vector, 5, tmp_path / FILE)
    read, count = load_placeholder(tmp_path / FILE, 7)
    assert torch.equal(read, vector) and count == 5
