"""`hasten generate`: one completion."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli import options, streams
from hasten.cli.groups import grouped
from hasten.cli.options import ForDecoding
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.engine import SamplingParams, TokenLogprobs
    from hasten.llm import LLM, Completion


@grouped
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from stdin.")],
    model: options.Model = "tiny",
    method: options.Method = "plain",
    max_tokens: options.MaxTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: the checkpoint's).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least this likely, relative to the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages tokens seen before.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Subtracted once for tokens of the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Subtracted per occurrence in the output.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes the text, whichever lossless method.")] = None,
    n: Annotated[int, typer.Option("--n", help="Independent completions.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End at this string (may be given several times).")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End at this token (may be given several times).")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="So many tokens before anything may end the text.")] = 0,
    bad_word: Annotated[list[str] | None, typer.Option(help="Never say this (may be given several times).")] = None,
    special_tokens: Annotated[bool, typer.Option("--special-tokens", help="Show special tokens, too.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Report this many likeliest tokens per position.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same of the prompt, with --json.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="JSON of this schema: a file, or the schema itself.")] = None,
    regex: Annotated[str | None, typer.Option(help="Text that this regular expression matches.")] = None,
    grammar: Annotated[str | None, typer.Option(help="Text of the grammar in this file (Lark or GBNF).")] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=BIAS", help="Added to a token's logit; -inf bans it (several times)."),
    ] = None,
    acceptance: Annotated[str, typer.Option(help="match, max or typical.")] = "match",
    chat: options.Chat = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    loading: ForDecoding = ForDecoding(),
    json: options.Json = False,
) -> None:
    """Complete a prompt, streaming the text as it comes."""
    from dataclasses import replace

    text = options.prompt_text(prompt)
    if not text:
        raise UserError("the prompt is empty")
    constraint = options.constraint(json_schema, regex, grammar)
    llm = loading.load(model)
    llm.engine.drafter(method)
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "stop": [streams.argument("a stop string", each) for each in stop] if stop else None,
    }  # fmt: skip
    defaults = llm.default_params
    params = replace(
        defaults,
        **{name: value for name, value in given.items() if value is not None},
        n=n,
        stop_token_ids=tuple(stop_token_id or ()),
        min_tokens=min_tokens,
        bad_words=tuple(bad_word or ()),
        skip_special_tokens=not special_tokens,
        logit_bias={**defaults.logit_bias, **_biases(logit_bias or [])},
        constraint=constraint,
        acceptance=acceptance,  # type: ignore[arg-type]  # SamplingParams says which are known
        ignore_eos=ignore_eos,
    )
    if chat or system is not None:
        messages = []
        if system is not None:
            messages.append({"role": "system", "content": streams.argument("the system message", system)})
        ids = llm.apply_chat_template([*messages, {"role": "user", "content": text}])
    else:
        ids = llm.encode(text)
    if json:
        options.emit(_document(llm, ids, params, method))
    elif n > 1:
        for number, choice in enumerate(llm.generate([ids], params, method)[0].choices, 1):
            print(f"--- {number} of {n}\n{choice.text}")
            _print_logprobs(llm, choice)
    else:
        _stream(llm, ids, params, method)


def _stream(llm: LLM, ids: list[int], params: SamplingParams, method: str) -> None:
    """Text to stdout as it comes, one line of figures to stderr."""
    completion = None
    for chunk in llm.stream(ids, params, method):
        print(chunk.text, end="", flush=True)
        completion = chunk.completion or completion
    print()
    if completion is not None:
        _print_logprobs(llm, completion)
    if completion is not None and sys.stderr.isatty():
        print(
            f"{len(completion.token_ids)} tokens, {completion.tokens_per_second:.0f}/s, "
            f"{completion.tokens_per_step:.2f} per step, {completion.finish_reason}",
            file=sys.stderr,
        )


def _biases(given: list[str]) -> dict[int, float]:
    """ID=BIAS, as often as it was given.

    Raises:
        UserError: something else was.
    """
    biases: dict[int, float] = {}
    for each in given:
        token, _, bias = each.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise UserError(f"logit-bias must be ID=BIAS, such as 42=-1.5, not {each!r}") from None
    return biases


def _print_logprobs(llm: LLM, completion: Completion) -> None:
    """A line per token: its log-probability, and those of the likeliest, each behind its text as Python writes it."""

    def said(token: int, logprob: float) -> str:
        return f"{llm.tokenizer.decode([token])!r} {logprob:.4f}"

    for item in completion.logprobs:
        print("\t".join([said(item.token, item.logprob), *(said(*pair) for pair in item.top)]))


def _document(llm: LLM, ids: list[int], params: SamplingParams, method: str) -> dict[str, Any]:
    generation = llm.generate([ids], params, method)[0]
    document = _choice(generation.choices[0])
    document["prompt_tokens"] = len(generation.prompt_token_ids)
    if generation.prompt_logprobs:
        document["prompt_logprobs"] = [item and _logprobs(item) for item in generation.prompt_logprobs]
    document["method"] = method
    if len(generation.choices) > 1:
        document["choices"] = [_choice(choice) for choice in generation.choices]
    return document


def _choice(completion: Completion) -> dict[str, Any]:
    document: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "steps": completion.steps,
        "tokens_per_step": round(completion.tokens_per_step, 4),
        "seconds": round(completion.seconds, 6),
        "tokens_per_second": round(completion.tokens_per_second, 2),
    }
    if completion.logprobs:
        document["logprobs"] = list(map(_logprobs, completion.logprobs))
    return document


def _logprobs(item: TokenLogprobs) -> dict[str, Any]:
    return {"token": item.token, "logprob": item.logprob, "top": [list(pair) for pair in item.top]}
