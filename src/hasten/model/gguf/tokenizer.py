"""The tokenizer that a GGUF file's metadata describes: byte-level BPE as of GPT-2, or SentencePiece as of Llama 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hasten.errors import UserError, one_line
from hasten.model.gguf.file import GGUF
from hasten.model.light_tokenizer import LightTokenizer

LONGEST = 1024
"""Characters of a token; longer ones would take hours to take apart."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of tokens."""

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 splits text, and most others after what is particular to them."""

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{LINES}"
LLAMA3 = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{LINES}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4", "gigachat"), (WORDS,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", WORDS)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), (QWEN2,)),
    "tekken": (TEKKEN,),
    "falcon": (r"[\p{P}$+<=>^~|`]+", WORDS, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}$+<=>^~|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""By the names of pre-tokenizers: what text is split by, one after the other."""

WHOLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Pre-tokenizers whose vocabulary wins over the merges, and whose texts begin with a token of their own."""

COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Pre-tokenizers of models that read text in Unicode's composed form."""

SPACE = "▁"
"""What stands for a space in SentencePiece."""

NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Tokens with a role, by transformers' names and GGUF's."""


def read_tokenizer(file: GGUF) -> LightTokenizer:
    """The tokenizer; transformers' own is made of it once somebody asks for more than decoding needs.

    Raises:
        UserError: none in the file, of a kind or with a pre-tokenizer that is not known, or damaged.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"tokenizer {kind!r} in {file.path} is not supported; supported are gpt2, llama")
    tokens = file.texts("tokenizer.ggml.tokens")
    _require_vocabulary(file, tokens)
    types = file.numbers("tokenizer.ggml.token_type") if "tokenizer.ggml.token_type" in file.metadata else []
    named = _named(file, tokens, kind)
    try:
        made = (
            _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types, named.get("unk_token"))
        )
        listed = {
            token: type_ == CONTROL
            for token, type_ in zip(tokens, types, strict=False)
            if type_ in (CONTROL, USER_DEFINED) and token
        }
        # A token with a role is special, unless the file says what it is.
        added = {**listed, **{token: True for token in named.values() if token not in listed}}
        made.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in added.items()])
        made.post_processor = _around(file, tokens, named)
    except UserError:
        raise
    except Exception as error:
        # The tokenizers library raises bare exceptions.
        raise UserError(f"{file.path} has no usable tokenizer: {one_line(error)}") from error
    template = file.text("tokenizer.chat_template", "") or None
    return LightTokenizer(made, named, template, lambda: _complete(made, named, template))


def _complete(made: Tokenizer, named: Mapping[str, str], template: str | None) -> Any:
    """transformers' tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, chat_template=template, clean_up_tokenization_spaces=False, **named
    )


def _require_vocabulary(file: GGUF, tokens: Sequence[str]) -> None:
    """Refuse a vocabulary without tokens, with one twice, or with more than the embedding has.

    Raises:
        UserError: with what is wrong.
    """
    embedding = file.tensors.get("token_embd.weight")
    if not tokens or (embedding is not None and len(tokens) > embedding.shape[0]):
        rows = "" if embedding is None else f", and an embedding of {embedding.shape[0]}"
        raise UserError(f"{file.path} has a vocabulary of {len(tokens)} tokens{rows}")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise UserError(f"{file.path} has the token {twice[:80]!r} twice in its vocabulary")
    if (longest := max(map(len, tokens))) > LONGEST:
        raise UserError(f"{file.path} has a token of {longest} characters; {LONGEST} is the most that is supported")


def _named(file: GGUF, tokens: Sequence[str], kind: str) -> dict[str, str]:
    """The tokens with a role, by transformers' names for it.

    Raises:
        UserError: an id that the vocabulary does not have.
    """
    # SentencePiece numbers these so, where the file does not say.
    usual = {"unknown": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    named: dict[str, str] = {}
    for name, theirs in NAMED.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        number = file.whole(key, usual.get(theirs)) if key in file.metadata or theirs in usual else None
        if number is not None and number >= len(tokens):
            raise UserError(f"{file.path} has {key} {number}, but {len(tokens)} tokens")
        if number is not None:
            named[name] = tokens[number]
    return named


def _byte_level(file: GGUF, tokens: Sequence[str]) -> Tokenizer:
    """BPE over bytes.

    Raises:
        UserError: an unknown pre-tokenizer (the message lists the known ones), or merges that are none.
    """
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        known = ", ".join(sorted(SPLITS))
        raise UserError(f"pre-tokenizer {name!r} in {file.path} is not supported; supported are {known}")
    merges = [_pair(merge) for merge in file.texts("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(_numbered(tokens), merges, ignore_merges=name in WHOLE))
    if name in COMPOSED:
        made.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _pair(merge: str) -> tuple[str, str]:
    # A piece may begin with a space, where a vocabulary has spaces as they are.
    end = merge.find(" ", 1)
    return merge[:end], merge[end + 1 :]


def _sentencepiece(file: GGUF, tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> Tokenizer:
    """BPE over characters, in the order of the tokens' scores, that falls back to bytes.

    Raises:
        UserError: not one score per token.
    """
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise UserError(f"{file.path} has {len(scores)} scores for {len(tokens)} tokens")
    merges = _merges(tokens, scores, types or [NORMAL] * len(tokens))
    made = Tokenizer(models.BPE(_numbered(tokens), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.normalizer = normalizers.Replace(" ", SPACE)
    if file.flag("tokenizer.ggml.add_space_prefix", True):
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), made.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(steps)
    return made


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make another piece, that of the highest score first."""
    pieces = {
        token: score
        for token, score, type_ in zip(tokens, scores, types, strict=False)
        if type_ not in (UNKNOWN, CONTROL, BYTE)
    }
    found = [
        (-score, -cut, -len(token), token)
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in sorted(found, key=lambda each: each[:3])]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _around(file: GGUF, tokens: Sequence[str], named: Mapping[str, str]) -> Any:
    """What adds the tokens that a text begins and ends with."""
    kind, pre = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre", "default")
    first = file.flag("tokenizer.ggml.add_bos_token", kind == "llama" or pre in WHOLE)
    last = file.flag("tokenizer.ggml.add_eos_token", False)
    begin = named.get("bos_token") if first else None
    end = named.get("eos_token") if last else None
    template = [*([] if begin is None else [begin]), "$A", *([] if end is None else [end])]
    used = {token for token in (begin, end) if token is not None}
    return processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=[(token, tokens.index(token)) for token in used]
    )
