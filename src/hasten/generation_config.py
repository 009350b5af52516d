"""What a checkpoint's generation_config.json asks for: sampling parameters, and what of it hasten does not do."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from hasten.engine import SamplingParams
from hasten.errors import UserError

SAMPLED = ("temperature", "top_k", "top_p", "min_p")
"""Fields that count where it says `do_sample`."""
HONOURED = {
    *SAMPLED, "do_sample", "repetition_penalty", "max_new_tokens", "stop_strings", "suppress_tokens", "bad_words_ids",
    "eos_token_id", "min_new_tokens",
}  # fmt: skip
SILENT = {
    "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "early_stopping",
    "length_penalty", "num_beam_groups", "diversity_penalty", "return_dict_in_generate", "renormalize_logits",
    "remove_invalid_values", "low_memory", "prefill_chunk_size", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type",
    "use_mtp", "target_lookbehind",
}  # fmt: skip
"""Fields that change no token of plain decoding: what stands around a text, memory, speed, and how beams compare."""
SILENT_BEGINNINGS = ("_", "output_", "cache_", "max_cache_", "compile_", "disable_compile", "continuous_", "assistant_")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    # The default of transformers' older releases, which wrote it into every file; `max_new_tokens` goes before it.
    "max_length": (20,),
}
"""Values of fields that ask for nothing."""


def unhonoured(config: Mapping[str, Any], positions: int) -> list[str]:
    """Fields that ask for something which hasten does not do.

    Args:
        positions: that the model has; a `max_length` which is not below says nothing.
    """
    return [
        name
        for name, value in config.items()
        if name not in HONOURED | SILENT
        and not name.startswith(SILENT_BEGINNINGS)
        and not _asks_for_nothing(name, value, positions)
        and not (name == "max_length" and config.get("max_new_tokens") is not None)
    ]


def _asks_for_nothing(name: str, value: Any, positions: int) -> bool:
    if value is None or value == [] or value == {} or value in NEUTRAL.get(name, ()):
        return True
    return name == "max_length" and isinstance(value, int) and value >= positions


def asked(config: Mapping[str, Any], vocabulary: int) -> SamplingParams:
    """Parameters as the file asks for them: greedy unless it says `do_sample`. A field may be absent or null.

    Args:
        vocabulary: ids that are not below ban nothing.

    Raises:
        UserError: a value that cannot be.
    """
    banned = {token: -inf for token in _banned(config) if 0 <= token < vocabulary}
    fields: dict[str, Any] = {
        "repetition_penalty": config.get("repetition_penalty"),
        "max_tokens": config.get("max_new_tokens"),
        "stop": config.get("stop_strings"),
        "logit_bias": banned,
        "min_tokens": config.get("min_new_tokens"),
        "bad_words": [tuple(word) for word in _words(config) if len(word) > 1 and max(word) < vocabulary],
    }
    if config.get("do_sample"):
        fields |= {name: config.get(name) for name in SAMPLED} | {
            "temperature": 1.0 if config.get("temperature") is None else config["temperature"]
        }
    return SamplingParams(**fields)


def _banned(config: Mapping[str, Any]) -> list[int]:
    """Tokens that no text may have."""
    suppressed = config.get("suppress_tokens") or []
    if not isinstance(suppressed, list) or not all(type(token) is int for token in suppressed):
        raise UserError("suppress_tokens of generation_config.json must be a list of token ids")
    return suppressed + [word[0] for word in _words(config) if len(word) == 1]


def _words(config: Mapping[str, Any]) -> list[list[int]]:
    """The words that are banned, as token ids.

    Raises:
        UserError: the field is something else.
    """
    words = config.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(
        isinstance(word, list) and word and all(type(token) is int for token in word) for word in words
    ):
        raise UserError("bad_words_ids of generation_config.json must be lists of token ids")
    return words
