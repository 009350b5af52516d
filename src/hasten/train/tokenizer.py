"""A byte-level BPE tokenizer for the models hasten trains itself.

Every digit is a token of its own, so arithmetic is learnable; a small vocabulary keeps the embedding small.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hasten.errors import UserError, one_line
from hasten.tasks import TASKS, examples, prose_chunks

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ message['content'] + '\\nAnswer:' }}{% endif %}"
    "{% endfor %}"
)
"""Each user turn is a task prompt; the models are trained on single turns."""


def corpus(samples_per_task: int, prose_share: float, seed: int) -> Iterator[str]:
    """Training text for the tokenizer: task samples, then prose until it makes up `prose_share` characters."""
    characters = 0
    for name in TASKS:
        for example in examples(name, "train", samples_per_task, seed):
            text = example.prompt + example.answer
            characters += len(text)
            yield text
    budget = int(characters * prose_share / (1 - prose_share))
    for chunk in prose_chunks("train"):
        if budget <= 0:
            return
        budget -= len(chunk)
        yield chunk


def train_tokenizer(
    vocabulary: int = 2048, context: int = 1024, samples_per_task: int = 400, seed: int = 0
) -> PreTrainedTokenizerFast:
    """Learn the merges and wrap them for transformers.

    Args:
        vocabulary: number of tokens, the 256 bytes and the two special tokens included.
        context: `model_max_length` written into the tokenizer's configuration.
        samples_per_task: examples of each task that the merges are learned from.
        seed: of those examples.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(samples_per_task, 0.35, seed), trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or GGUF file, so that a drafter can share it.

    Raises:
        UserError: none there, or it is damaged.
    """
    if folder.is_file():
        from hasten.model import gguf

        tokenizer: PreTrainedTokenizerFast = gguf.read_tokenizer(gguf.open_gguf(folder)).complete
        return tokenizer
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises bare exceptions.
        raise UserError(f"{folder} has no usable tokenizer: {one_line(error)}") from error
    return tokenizer


def with_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a mask token: its own, or a new one with the next id."""
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer
